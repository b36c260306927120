"""Load balancing: assigns tasks to ranks by step times and batch sizes, or by a mapping from the config.

A step takes as long as its busiest rank. A rank's load is the sum of its tasks' step times, or 1 / D of one task's in a
data group of D ranks: the cost of sharing a batch is ignored.
"""

import heapq
import math
from collections.abc import Mapping, Sequence
from itertools import product

from dist_cts.distributed.placement import Assignment, even_assignment

CANDIDATES = 8  # divisions of the ranks that are tried per number of data groups, lowest bound first

Costs = dict[str, float] | None  # seconds per inner step on one rank, by task name
Grouping = tuple[float, tuple[int, ...]]  # predicted load, and the sizes of the data groups


def describe_assignment(assignment: Assignment, names: Sequence[str], costs: Costs) -> str:
    """One line: the tasks of each rank and, with `costs`, the predicted step time."""
    tasks: dict[tuple[int, ...], list[str]] = {}
    for ranks, name in sorted(zip(assignment, names, strict=True)):
        tasks.setdefault(ranks, []).append(name)
    where = "; ".join(f"{', '.join(own)} on {'+'.join(map(str, ranks))}" for ranks, own in tasks.items())
    if costs is None:
        return f"placement on ranks: {where}"
    step = max(loads(assignment, [costs[name] for name in names]))
    return f"placement on ranks: {where}; {1e3 * step:.3g} ms per step, without data and communication"


def loads(assignment: Assignment, costs: Sequence[float]) -> list[float]:
    """The predicted load of every rank, from the step time of every task on one rank."""
    total = [0.0] * (1 + max(rank for ranks in assignment for rank in ranks))
    for ranks, cost in zip(assignment, costs, strict=True):
        for rank in ranks:
            total[rank] += cost / len(ranks)
    return total


def plan(costs: Sequence[float], world_size: int, batch_sizes: Sequence[int]) -> Assignment:
    """The assignment that minimizes the busiest rank's load with a task on every rank; prefers the even one if equal.

    The heaviest tasks may get data groups of sizes that divide their batches; the others go, heaviest first, to the
    least loaded of the remaining ranks. On up to 8 ranks with one batch size the load is at most 4/3 of the optimum.

    Args:
        costs: every task's step time on one rank, above 0, in any unit.
        batch_sizes: every task's; 1 keeps a task on one rank.

    Raises:
        ValueError: no placement gives every rank a task.
    """
    order = sorted(range(len(costs)), key=lambda task: -costs[task])
    best = _even(world_size, batch_sizes)
    least = max(loads(best, costs)) if best else math.inf
    groupings: dict[int, Grouping] = {0: (0.0, ())}  # of the `heavy` heaviest tasks, by the number of ranks used
    for heavy in range(len(order) + 1):
        light = order[heavy:]
        work = sum(costs[task] for task in light)
        bounds = {  # a lower bound of the load: light tasks as if divisible
            taken: max(load, work / (world_size - taken)) if light else load
            for taken, (load, _) in groupings.items()
            if (taken < world_size if light else taken == world_size)
        }
        groupings = {taken: groupings[taken] for taken, bound in bounds.items() if bound < least}
        for taken in sorted(groupings, key=bounds.get)[:CANDIDATES]:
            if world_size - taken <= len(light):
                assignment = _number_ranks(order[:heavy], groupings[taken][1], _pack(light, costs, world_size - taken))
                if (load := max(loads(assignment, costs))) < least:
                    best, least = assignment, load
        if light:
            groupings = _with_group(groupings, costs[light[0]], batch_sizes[light[0]], world_size)
    if best is None:
        raise ValueError(
            f"placement=auto: {len(costs)} tasks do not fit {world_size} ranks: the number of ranks that share a task "
            f"must divide its batch size ({min(batch_sizes)} to {max(batch_sizes)}); start fewer ranks"
        )
    return best


def named_assignment(mapping: Mapping[str, Sequence[int]], names: Sequence[str], world_size: int) -> Assignment:
    """The assignment that a config gives by name: the ranks of every task.

    Raises:
        ValueError: an unknown task, or a rank out of range, listed twice or idle; the message names the first fault.
    """
    if unknown := mapping.keys() - set(names):
        raise ValueError(f"placement: unknown task {min(unknown)!r}; the tasks are {', '.join(names)}")
    for name in names:
        ranks = mapping.get(name, ())
        if not ranks:
            raise ValueError(f"placement: task {name} has no rank; add it to the mapping")
        if len(set(ranks)) < len(ranks):
            raise ValueError(f"placement: task {name} lists a rank twice: {list(ranks)}")
        for rank in ranks:
            if not 0 <= rank < world_size:
                raise ValueError(f"placement: task {name} is on rank {rank}, but ranks are 0 to {world_size - 1}")
            if len(ranks) > 1 and (shared := [n for n in mapping if n != name and rank in mapping[n]]):
                raise ValueError(
                    f"placement: rank {rank} shares task {name} and also has {', '.join(shared)}; "
                    "a rank that shares a task cannot have another one"
                )
    if idle := set(range(world_size)) - {rank for ranks in mapping.values() for rank in ranks}:
        raise ValueError(f"placement: rank {min(idle)} of {world_size} has no task; start fewer ranks or assign one")
    return tuple(tuple(sorted(mapping[name])) for name in names)


def _even(world_size: int, batch_sizes: Sequence[int]) -> Assignment | None:
    """The even assignment; None if the tasks or the batches do not divide evenly."""
    share, rest = divmod(world_size, len(batch_sizes))
    if share and (rest or any(size % share for size in batch_sizes)):
        return None
    return even_assignment(len(batch_sizes), world_size)


def _with_group(groupings: dict[int, Grouping], cost: float, batch_size: int, world_size: int) -> dict[int, Grouping]:
    """The groupings with one more group, for a task of that cost: the best per number of ranks used."""
    more: dict[int, Grouping] = {}
    divisors = [size for size in range(2, world_size + 1) if batch_size % size == 0]
    for (taken, (load, sizes)), size in product(groupings.items(), divisors):
        if taken + size <= world_size and max(load, cost / size) < more.get(taken + size, (math.inf,))[0]:
            more[taken + size] = (max(load, cost / size), (*sizes, size))
    return more


def _pack(tasks: Sequence[int], costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Puts each task, heaviest first, on the least loaded rank."""
    piles: list[list[int]] = [[] for _ in range(ranks)]
    queue = [(0.0, rank) for rank in range(ranks)]
    for task in tasks:
        load, rank = queue[0]
        piles[rank].append(task)
        heapq.heapreplace(queue, (load + costs[task], rank))
    return piles


def _number_ranks(heavy: Sequence[int], sizes: Sequence[int], piles: Sequence[Sequence[int]]) -> Assignment:
    """Numbers the ranks, largest groups first, so that groups of 2, 4 or 8 stay within a node."""
    assignment: dict[int, tuple[int, ...]] = {}
    first = 0
    for size, task in sorted(zip(sizes, heavy, strict=True), reverse=True):
        assignment[task] = tuple(range(first, first + size))
        first += size
    assignment |= {task: (rank,) for rank, pile in enumerate(piles, first) for task in pile}
    return tuple(assignment[task] for task in range(len(assignment)))
