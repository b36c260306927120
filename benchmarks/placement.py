"""The paper's eight tasks on fewer and more ranks than tasks: even and automatic placement; see --help."""

from functools import partial

import torch
import torch.distributed as dist

from benchmarks import learners, report
from dist_cts import models
from dist_cts.data.prepare import suites
from dist_cts.data.prepare.task import task_name
from dist_cts.distributed.balance import describe_assignment, loads, plan
from dist_cts.distributed.placement import Assignment, Placement, data_group, even_assignment
from dist_cts.distributed.sync_batch_norm import convert_sync_batch_norm
from dist_cts.learner import TaskLearner
from dist_cts.models import ModelConfig
from dist_cts.run.costs import RepeatedBatch, random_batch, step_seconds

EPILOG = """\
The tasks are those of the suite paper-8, 28 to 84 px, with random images of that size, which cost the same.
predicted  the load of the busiest rank, from step times measured on rank 0 (placement=auto does the same)
measured   a CTS step on the ranks started here, the two placements taking turns, without loading data
model      NOT a measurement: the same prediction for more ranks, each as fast as one here; no cost of
           sharing a task or of communication

  python benchmarks/placement.py --world-size 2
"""
TASKS = {  # pixels and classes
    task_name(task.entry, None, task.options): (task.entry.pixels, (task.expected or (0, 0, task.entry.classes))[2])
    for task in suites.suite("paper-8")
}


def make_learner(name: str, model: str, batch: RepeatedBatch, device: torch.device) -> TaskLearner:
    module, head = models.build(ModelConfig(name=model), TASKS[name][1], 0)
    return TaskLearner(name, module.to(device), head, batch, learners.INNER)


def place_learners(placement: Placement, model: str, batch_size: int, device: torch.device) -> learners.MetaTraining:
    """This rank's learners, in data groups where tasks are shared, and the loop over them."""
    group, own = data_group(placement), []
    for name in [list(TASKS)[task] for task in placement.local_tasks]:
        batch = random_batch(TASKS[name][0], batch_size // placement.data_ranks, device)
        own.append(make_learner(name, model, batch, device))
        own[-1].data_group, own[-1].model = group, convert_sync_batch_norm(own[-1].model, group)
    return learners.MetaTraining(own, len(TASKS), placement)


def measure(device: torch.device, model: str, batch_size: int, rounds: int) -> dict:
    """Step times alone, and of both placements in every round; run on every rank."""
    world_size, rank = dist.get_world_size(), dist.get_rank()
    found: list[dict[int, float]] = [{}]
    for name, (pixels, _) in TASKS.items():
        if rank == 0 and pixels not in found[0]:
            found[0][pixels] = step_seconds(make_learner(name, model, random_batch(pixels, batch_size, device), device))
    dist.broadcast_object_list(found, src=0)
    costs = {name: found[0][pixels] for name, (pixels, _) in TASKS.items()}
    assignment = placements(list(costs.values()), world_size, batch_size)
    trainings = {
        name: place_learners(Placement(where, world_size, rank), model, batch_size, device)
        for name, where in assignment.items()
    }
    steps = {name: partial(learners.finish, device, training.step) for name, training in trainings.items()}
    return {"costs": costs, "seats": assignment, "seconds_per_step": report.alternate(steps, rounds, warm_up=2)}


def placements(costs: list[float], world_size: int, batch_size: int) -> dict[str, Assignment]:
    """The planned placement, and the even one if it exists."""
    found = {"auto": plan(costs, world_size, [batch_size] * len(costs))}
    if world_size <= len(costs) or world_size % len(costs) == 0:
        found = {"even": even_assignment(len(costs), world_size)} | found
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = report.parser(__doc__, EPILOG)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--world-size", type=int, default=2, help="number of ranks to start; not under torchrun (default 2)"
    )
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--batch-size", type=int, default=16, help="of every task (default %(default)s; paper: 128)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 5, 8, 16], help="of the model (default 4 5 8 16)")
    args = parser.parse_args(arguments)
    if args.quick:
        args.model, args.batch_size, args.rounds = "tiny", 8, 3
    results = learners.on_ranks(args.world_size, args.device, measure, args.model, args.batch_size, args.rounds)
    if results is None:
        return  # torchrun's ranks above 0
    costs, rows = results["costs"], []
    for ranks in (args.world_size, *args.ranks):
        assignment = placements(list(costs.values()), ranks, args.batch_size)
        for name, where in assignment.items():
            measured = results["seconds_per_step"][name] if ranks == args.world_size else None
            seconds = max(loads(where, list(costs.values())))
            row = {"ranks": ranks, "placement": name, "predicted, ms": 1e3 * seconds}
            row["measured, ms"] = (
                report.shown(report.spread([1e3 * s for s in measured])) if measured else "only a model"
            )
            row["ranks busy, predicted"] = f"{100 * sum(costs.values()) / ranks / seconds:.0f} %"
            rows.append(row)
            print(f"{ranks} ranks, {name}: {describe_assignment(where, list(TASKS), costs)}")
    settings = {"model": args.model, "batch_size": args.batch_size}
    report.publish("placement", settings | results, rows, args, args.device, args.world_size)


if __name__ == "__main__":
    main()
