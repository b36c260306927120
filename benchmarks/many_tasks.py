"""T tasks on one device: dist_cts in one process against a plain loop over T modules; see --help."""

from dataclasses import asdict
from functools import partial

import torch
import torch.distributed as dist

from benchmarks import learners, report
from dist_cts.step_graph import use_graphs

EPILOG = """\
A round is one step of every task, the same model, images, augmentation and batch size for both:
  eager  plain PyTorch, one task after the other: T modules, T fused SGD optimizers
  ours   T learners and the meta-update, as a run does them
  graph  with --graph: ours with step=graph, the learners side by side on streams of their own
With --world-size, each rank has T tasks.

  python benchmarks/many_tasks.py --model resnet20 --batch-size 128 --tasks 1 2 4 8 16
"""


def measure(
    device: torch.device,
    model: str,
    batch_size: int,
    pixels: int,
    counts: list[int],
    rounds: int,
    numerics: learners.Numerics,
    graph: bool,
) -> dict[str, dict[str, list[float]]]:
    """Seconds of each round by number of tasks a rank and competitor; run on every rank."""
    results, ranks = {}, dist.get_world_size()
    noise = learners.Noise(device, pixels=pixels)
    for count in counts:
        plain = [learners.PlainTask(noise, model, batch_size, numerics) for _ in range(count)]
        own = [learners.make_learner(noise, model, batch_size, numerics) for _ in range(count)]
        steps = {"eager": partial(one_by_one, plain), "ours": learners.MetaTraining(own, count * ranks).step}
        if graph:
            graphed = [learners.make_learner(noise, model, batch_size, numerics) for _ in range(count)]
            use_graphs(graphed)
            steps["graph"] = learners.MetaTraining(graphed, count * ranks).step
        competitors = {name: partial(learners.finish, device, step) for name, step in steps.items()}
        results[str(count)] = report.alternate(competitors, rounds, warm_up=2)
    return results


def one_by_one(tasks: list[learners.PlainTask]) -> None:
    for task in tasks:
        task.step()


def main(arguments: list[str] | None = None) -> None:
    parser = report.parser(__doc__, EPILOG)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--world-size", type=int, default=1, help="ranks, each with its T tasks (default 1)")
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--pixels", type=int, default=32)
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="T (default 1 2 4 8 16)")
    parser.add_argument("--rounds", type=int, default=15)
    learners.Numerics.add_arguments(parser)
    args = learners.parse_graph(parser, arguments)
    numerics = learners.Numerics.of(args)
    if args.quick:
        args.model, args.batch_size, args.pixels, args.tasks, args.rounds = "tiny", 8, 16, [1, 4], 3
    shape = (args.model, args.batch_size, args.pixels)
    results = learners.on_ranks(
        args.world_size, args.device, measure, *shape, args.tasks, args.rounds, numerics, args.graph, numerics=numerics
    )
    if results is None:
        return  # torchrun's ranks above 0
    rows = []
    for tasks, seconds in results.items():
        images = int(tasks) * args.batch_size * args.world_size
        rates = {name: [images / value for value in values] for name, values in seconds.items()}
        row = {"tasks": tasks} | {f"{name}, images/s": report.shown(report.spread(rates[name])) for name in rates}
        rows.append(
            row
            | {f"{name} / eager": report.shown(report.ratio(rates[name], rates["eager"])) for name in list(rates)[1:]}
        )
    settings = {"model": args.model, "batch_size": args.batch_size, "pixels": args.pixels, **asdict(numerics)}
    results = settings | {"seconds_per_round": results}
    report.publish("many-tasks", results, rows, args, args.device, args.world_size)


if __name__ == "__main__":
    main()
