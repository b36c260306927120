"""Which tasks sit on which ranks, where tasks differ in cost: planned from step times, or as the config names them.

A step takes as long as its busiest rank. A rank's load is the sum of its own tasks' step times, or the D-th part of one
task's in a data group of D ranks: this model takes sharing a batch for free.
"""

import heapq
import json
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from dist_cts.data.beton import read_manifest
from dist_cts.distributed.placement import Assignment, even_assignment
from dist_cts.distributed.process_group import raise_on_all_ranks
from dist_cts.learner import Batches, TaskLearner

if TYPE_CHECKING:
    from dist_cts.run.config import TrainConfig

LOOKS = 8  # divisions of the ranks that are tried for each number of data groups, the most promising first
STEP_SECONDS = "step_seconds.json"  # in the run folder

Costs = dict[str, float] | None  # seconds that an inner step of every task takes on one rank, by the task's name
BuildLearner = Callable[[str, int, Batches], TaskLearner]  # of name, classes and batches
Grouping = tuple[float, tuple[int, ...]]  # predicted load, and the sizes of the data groups


def choose_assignment(config: "TrainConfig", costs: Costs, world_size: int) -> Assignment:
    """The ranks of every task as `placement` says; `costs` are those of `agree_on_costs`, for `auto`.

    Raises:
        ValueError: tasks and ranks do not fit.
    """
    names = [task.name for task in config.tasks]
    if config.placement == "even":
        return even_assignment(len(names), world_size)
    if config.placement != "auto":
        return named_assignment(config.placement, names, world_size)
    sizes = [task.batch_size or config.batch_size for task in config.tasks]
    if config.algorithm == "imaml":  # it cannot share a task
        sizes = [1] * len(names)
    return plan([costs[name] for name in names], world_size, sizes)


def agree_on_costs(config: "TrainConfig", device: torch.device, build: BuildLearner, fresh: bool = False) -> Costs:
    """Every task's step time on one rank: what rank 0 measures, on random images, counts for all.

    A run that goes on takes those that its folder holds: the same number of ranks then has the same placement, and
    with it the same bits. A `fresh` one measures.

    Raises:
        ValueError, FileNotFoundError: a task is not there.
    """
    costs: list[dict[str, float]] = [{}]
    with raise_on_all_ranks():
        if dist.get_rank() == 0:
            file = config.run_dir / STEP_SECONDS
            if file.exists() and not fresh:
                costs[0] = json.loads(file.read_text())
            if costs[0].keys() != {task.name for task in config.tasks}:
                costs[0] = _measure(config, device, build)
    dist.broadcast_object_list(costs, src=0)
    return costs[0]


def keep_costs(folder: Path, costs: Costs) -> None:
    """Writes the costs, if any, for the run to go on with."""
    if costs is not None:
        file = folder / f"{STEP_SECONDS}.new"
        file.write_text(json.dumps(costs, indent=1) + "\n")
        file.replace(folder / STEP_SECONDS)


def _measure(config: "TrainConfig", device: torch.device, build: BuildLearner) -> dict[str, float]:
    costs, measured = {}, {}
    for task in config.tasks:
        manifest = read_manifest(config.data.root / task.name / "train")
        shape = manifest.pixels, task.batch_size or config.batch_size
        if shape not in measured:
            measured[shape] = step_seconds(build(task.name, manifest.classes, RandomBatch(*shape, device)))
        costs[task.name] = measured[shape]
    return costs


class RandomBatch:
    """The same random images and labels at every step, to measure steps by."""

    def __init__(self, pixels: int, batch_size: int, device: torch.device) -> None:
        self.images = torch.rand(batch_size, 3, pixels, pixels, device=device)
        self.labels = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.wait_seconds = 0.0

    def next(self) -> tuple[Tensor, Tensor]:
        """Images, float32 [B, 3, P, P], and labels, int64 [B]."""
        return self.images, self.labels


def step_seconds(learner: TaskLearner) -> float:
    """The median time of an inner step: of those in half a second, at least of one, after some to warm up."""
    from torch.utils.benchmark import Timer  # waits for the device, too

    timer = Timer("learner.inner_step()", globals={"learner": learner}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=0.5).median


def describe(assignment: Assignment, names: Sequence[str], costs: Costs) -> str:
    """A line: which tasks sit where and, with `costs`, how long a step should take."""
    tasks: dict[tuple[int, ...], list[str]] = {}
    for ranks, name in sorted(zip(assignment, names, strict=True)):
        tasks.setdefault(ranks, []).append(name)
    where = "; ".join(f"{', '.join(own)} on {'+'.join(map(str, ranks))}" for ranks, own in tasks.items())
    if costs is None:
        return f"placement on ranks: {where}"
    step = max(loads(assignment, [costs[name] for name in names]))
    return f"placement on ranks: {where}; {1e3 * step:.3g} ms a step, without data and communication"


def loads(assignment: Assignment, costs: Sequence[float]) -> list[float]:
    """Every rank's predicted load, from every task's step time on one rank."""
    total = [0.0] * (1 + max(rank for ranks in assignment for rank in ranks))
    for ranks, cost in zip(assignment, costs, strict=True):
        for rank in ranks:
            total[rank] += cost / len(ranks)
    return total


def plan(costs: Sequence[float], world_size: int, batch_sizes: Sequence[int]) -> Assignment:
    """The placement whose busiest rank has least to do, each rank having a task; of equals, the even one.

    Some of the heaviest tasks get data groups, of sizes that divide their batches; the others go, the heaviest first,
    to the least loaded of the ranks left. On up to 8 ranks and with one batch size, no placement takes less than 3/4.

    Args:
        costs: every task's step time on one rank, above 0, in any unit.
        batch_sizes: every task's; 1 keeps a task on one rank.

    Raises:
        ValueError: no placement gives every rank a task.
    """
    order = sorted(range(len(costs)), key=lambda task: -costs[task])
    best = _even(world_size, batch_sizes)
    least = max(loads(best, costs)) if best else math.inf
    groupings: dict[int, Grouping] = {0: (0.0, ())}  # of the `heavy` heaviest tasks, by the ranks that they take
    for heavy in range(len(order) + 1):
        light = order[heavy:]
        work = sum(costs[task] for task in light)
        bounds = {  # the load of the busiest rank, were the light tasks divisible at will
            taken: max(load, work / (world_size - taken)) if light else load
            for taken, (load, _) in groupings.items()
            if (taken < world_size if light else taken == world_size)
        }
        groupings = {taken: groupings[taken] for taken, bound in bounds.items() if bound < least}
        for taken in sorted(groupings, key=bounds.get)[:LOOKS]:
            if world_size - taken <= len(light):
                assignment = _number_ranks(order[:heavy], groupings[taken][1], _pack(light, costs, world_size - taken))
                if (load := max(loads(assignment, costs))) < least:
                    best, least = assignment, load
        if light:
            groupings = _with_group(groupings, costs[light[0]], batch_sizes[light[0]], world_size)
    if best is None:
        raise ValueError(
            f"placement=auto: no way to give each of {world_size} ranks a share of {len(costs)} tasks, as the ranks "
            f"that share a task must divide its batch ({min(batch_sizes)} to {max(batch_sizes)} images): start fewer"
        )
    return best


def named_assignment(mapping: Mapping[str, Sequence[int]], names: Sequence[str], world_size: int) -> Assignment:
    """The placement that a config names: the ranks of every task.

    Raises:
        ValueError: a task, a rank or its number does not fit; the first fault is named.
    """
    if unknown := mapping.keys() - set(names):
        raise ValueError(f"placement: there is no task {min(unknown)!r} among {', '.join(names)}")
    for name in names:
        ranks = mapping.get(name, ())
        if not ranks:
            raise ValueError(f"placement: task {name} has no rank")
        if len(set(ranks)) < len(ranks):
            raise ValueError(f"placement: task {name} has a rank twice: {list(ranks)}")
        for rank in ranks:
            if not 0 <= rank < world_size:
                raise ValueError(f"placement: task {name} is on rank {rank}, the ranks are 0 to {world_size - 1}")
            if len(ranks) > 1 and (shared := [n for n in mapping if n != name and rank in mapping[n]]):
                raise ValueError(
                    f"placement: rank {rank} shares task {name} with other ranks and has {', '.join(shared)} too; "
                    "a rank that shares a task has no other"
                )
    if idle := set(range(world_size)) - {rank for ranks in mapping.values() for rank in ranks}:
        raise ValueError(f"placement: rank {min(idle)} of {world_size} has no task; start fewer ranks, or give it one")
    return tuple(tuple(sorted(mapping[name])) for name in names)


def _even(world_size: int, batch_sizes: Sequence[int]) -> Assignment | None:
    """The even placement, if there is one and the batches divide."""
    share, rest = divmod(world_size, len(batch_sizes))
    if share and (rest or any(size % share for size in batch_sizes)):
        return None
    return even_assignment(len(batch_sizes), world_size)


def _with_group(groupings: dict[int, Grouping], cost: float, batch_size: int, world_size: int) -> dict[int, Grouping]:
    """The groupings with one more group, for a task of that cost: the best for every number of ranks taken."""
    more: dict[int, Grouping] = {}
    divisors = [size for size in range(2, world_size + 1) if batch_size % size == 0]
    for (taken, (load, sizes)), size in product(groupings.items(), divisors):
        if taken + size <= world_size and max(load, cost / size) < more.get(taken + size, (math.inf,))[0]:
            more[taken + size] = (max(load, cost / size), (*sizes, size))
    return more


def _pack(tasks: Sequence[int], costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Tasks, the heaviest first, each on the rank that has least so far."""
    piles: list[list[int]] = [[] for _ in range(ranks)]
    queue = [(0.0, rank) for rank in range(ranks)]
    for task in tasks:
        load, rank = queue[0]
        piles[rank].append(task)
        heapq.heapreplace(queue, (load + costs[task], rank))
    return piles


def _number_ranks(heavy: Sequence[int], sizes: Sequence[int], piles: Sequence[Sequence[int]]) -> Assignment:
    """Numbers the ranks: the largest groups first, so that groups of 2, 4 or 8 do not straddle two nodes."""
    assignment: dict[int, tuple[int, ...]] = {}
    first = 0
    for size, task in sorted(zip(sizes, heavy, strict=True), reverse=True):
        assignment[task] = tuple(range(first, first + size))
        first += size
    assignment |= {task: (rank,) for rank, pile in enumerate(piles, first) for task in pile}
    return tuple(assignment[task] for task in range(len(assignment)))
