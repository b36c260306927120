"""A CTS step against SGD without communication, DistributedDataParallel, and the released code's way; see --help."""

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from unittest import mock

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks import learners, report
from dist_cts.step_graph import use_graphs

EPILOG = """\
competitors, all on the same model, images, augmentation, batch size, fused SGD and threads, taking turns:
  cts       the loop of dist_cts: one flat vector, one all-reduce of phi - theta a step, theta and phi shifted
  sgd       plain PyTorch on every rank, nothing exchanged
  ddp       plain PyTorch under DistributedDataParallel (gradient_as_bucket_view, no broadcast of batch-norm statistics)
  graph     with --graph: cts, its inner steps as CUDA graphs
  released  CTS tensor by tensor, as the paper's released code does it: clone, cat, all-reduce, copy back
A round ends when the last rank is done. CPU time is that of rank 0, all its threads. The parts of a CTS step are
measured apart, with a barrier before the all-reduce: what the barrier takes is `wait`.

  python benchmarks/step_time.py --world-size 2
  torchrun --nproc_per_node=8 benchmarks/step_time.py --device cuda --precision bf16 --channels-last
"""
CASES = ["resnet20/128/32", "resnet20/8/32", "resnet18/32/32", "resnet18/4/32"]
BLOCK = 2  # steps of a competitor in a round


class Released(learners.PlainTask):
    """Continual trajectory shifting as the released code's step is organised: a tensor at a time."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        named = dict(self.model.named_parameters())
        self.theta = {name: p.detach() for name, p in named.items() if not name.startswith("fc")}
        self.phi = {name: p.clone() for name, p in self.theta.items()}

    def step(self) -> None:
        super().step()
        before = {name: p.clone() for name, p in self.phi.items()}
        for name, p in self.theta.items():
            self.phi[name] -= 0.01 * (self.phi[name] - p)
        vector = torch.cat([p.flatten() for p in self.phi.values()])
        dist.all_reduce(vector)
        vector /= dist.get_world_size()
        for p, part in zip(self.phi.values(), vector.split([p.numel() for p in self.phi.values()]), strict=True):
            p.copy_(part.view_as(p))
        for name, p in self.theta.items():
            p += self.phi[name] - before[name]


def measure(
    noise: learners.Noise,
    model: str,
    batch_size: int,
    seconds: float,
    numerics: learners.Numerics = learners.DEFAULT,
    graph: bool = False,
) -> dict:
    """Seconds a step of every competitor, a value a round, and of the parts of a CTS step; run on every rank."""
    device = noise.device
    plain, ddp = (learners.PlainTask(noise, model, batch_size, numerics) for _ in range(2))
    ddp.model = DistributedDataParallel(ddp.model, gradient_as_bucket_view=True, broadcast_buffers=False)
    released = Released(noise, model, batch_size, numerics)
    learner = learners.make_learner(noise, model, batch_size, numerics)
    cts = learners.MetaTraining([learner], dist.get_world_size())
    steps = {"cts": cts.step, "sgd": plain.step, "ddp": ddp.step, "released": released.step}
    if graph:
        graphed = learners.make_learner(noise, model, batch_size, numerics)
        use_graphs([graphed])
        steps["graph"] = learners.MetaTraining([graphed], dist.get_world_size()).step
    cpu: dict[str, list[float]] = {name: [] for name in steps}

    def block(name: str) -> None:
        """BLOCK steps, until the last rank has taken them."""
        started = time.process_time()
        learners.finish(device, steps[name], BLOCK)
        cpu[name].append((time.process_time() - started) / BLOCK)

    competitors = {name: partial(block, name) for name in steps}
    report.alternate(competitors, 1)  # DDP makes its buckets, kernels are chosen
    round_time = sum(report.alternate(competitors, 1, warm_up=0)[name][0] for name in steps)
    rounds = torch.tensor(max(3, round(seconds / round_time)), device=device)
    dist.broadcast(rounds, 0)
    times = report.alternate(competitors, int(rounds), warm_up=0)
    return {
        "seconds_per_step": {name: [value / BLOCK for value in values] for name, values in times.items()},
        "cpu_seconds_per_step": {name: values[-int(rounds) :] for name, values in cpu.items()},
        "seconds_of_parts": parts(cts, device),
        "bytes_reduced": 4 * cts.reducer.message_numel,
    }


class Stopwatch:
    """Seconds by part: what a watched call spends in another watched call counts for that one."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self._inside = device, defaultdict(float), [0.0]

    def watch(self, part: str, function: Callable) -> Callable:
        def watched(*args: object, **options: object) -> object:
            learners.synchronise(self.device)
            started = time.perf_counter()
            self._inside.append(0.0)
            result = function(*args, **options)
            learners.synchronise(self.device)
            elapsed = time.perf_counter() - started
            self.seconds[part] += elapsed - self._inside.pop()
            self._inside[-1] += elapsed
            return result

        return watched


def parts(cts: learners.MetaTraining, device: torch.device, steps: int = 10) -> dict[str, float]:
    """Seconds of each part of a CTS step, the mean over steps and ranks."""
    watch, learner = Stopwatch(device), cts.learners[0]
    all_reduce = watch.watch("all-reduce", dist.all_reduce)
    wait = watch.watch("wait", dist.barrier)

    def wait_then_reduce(*args: object, **options: object) -> object:
        wait()
        return all_reduce(*args, **options)

    algorithm = cts.algorithm
    cts.algorithm = replace(
        algorithm,
        meta_gradient=watch.watch("pack", algorithm.meta_gradient),
        shift=watch.watch("shift", algorithm.shift),
    )
    patch = mock.patch.object
    with (
        patch(learner.batches, "next", watch.watch("data", learner.batches.next)),
        patch(learner, "compute_gradient", watch.watch("forward, backward", learner.compute_gradient)),
        patch(learner.optimizer, "step", watch.watch("update", learner.optimizer.step)),
        patch(cts.reducer, "start", watch.watch("pack", cts.reducer.start)),
        patch(cts.reducer, "finished", watch.watch("pack", cts.reducer.finished)),
        patch(dist, "all_reduce", wait_then_reduce),
    ):
        watch.watch("rest", lambda: [cts.step() for _ in range(steps)])()
    cts.algorithm = algorithm
    order = ("data", "forward, backward", "update", "pack", "wait", "all-reduce", "shift", "rest")
    seconds = torch.tensor([watch.seconds[part] for part in order], dtype=torch.float64, device=device)
    dist.all_reduce(seconds)
    return dict(zip(order, (seconds / dist.get_world_size() / steps).tolist(), strict=True))


def measure_all(
    device: torch.device, cases: list[str], seconds: float, numerics: learners.Numerics, graph: bool
) -> dict[str, dict]:
    """`measure` of every MODEL/BATCH/PIXELS."""
    results = {}
    for case in cases:
        model, batch_size, pixels = case.split("/")
        noise = learners.Noise(device, pixels=int(pixels))
        results[case] = measure(noise, model, int(batch_size), seconds, numerics, graph)
    return results


def main(arguments: list[str] | None = None) -> None:
    parser = report.parser(__doc__, EPILOG)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--world-size", type=int, default=2, help="ranks to start, unless torchrun has (default 2)")
    parser.add_argument("--cases", nargs="+", default=CASES, help=f"MODEL/BATCH/PIXELS (default {' '.join(CASES)})")
    parser.add_argument("--seconds", type=float, default=60, help="to spend on a case (default %(default)s)")
    learners.Numerics.add_arguments(parser)
    args = learners.parse_graph(parser, arguments)
    numerics = learners.Numerics.of(args)
    if args.quick:
        args.cases, args.seconds = ["tiny/8/16"], 1
    results = learners.on_ranks(
        args.world_size, args.device, measure_all, args.cases, args.seconds, numerics, args.graph, numerics=numerics
    )
    if results is None:
        return  # torchrun's ranks above 0
    rows, parts_rows = [], []
    for case, result in results.items():
        times, cpu = result["seconds_per_step"], result["cpu_seconds_per_step"]
        for name, values in times.items():
            row = {"model/batch/pixels": case, "step": name}
            row["ms"] = report.shown(report.spread([1e3 * value for value in values]))
            row["CPU ms"] = report.shown(report.spread([1e3 * value for value in cpu[name]]))
            row["cts / it"] = report.shown(report.ratio(times["cts"], values))
            row["cts / it, CPU"] = report.shown(report.ratio(cpu["cts"], cpu[name]))
            rows.append(row)
        split = {name: 1e3 * value for name, value in result["seconds_of_parts"].items()}
        parts_rows.append({"ms of a cts step": case, **split})
    print(report.table(parts_rows), end="\n\n")
    results = {"settings": asdict(numerics), "cases": results}
    report.publish("step-time", results, rows, args, args.device, args.world_size)


if __name__ == "__main__":
    main()
