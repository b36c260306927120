"""Placement: which of T tasks run on which of W ranks; the even assignment; data groups that share a task."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property

import torch.distributed as dist

Assignment = tuple[tuple[int, ...], ...]  # the ranks of every task, in task order; a task's ranks ascend


@dataclass(frozen=True)
class Placement:
    """T tasks on W ranks, seen from one rank.

    A rank either has one or more tasks of its own, or is one of the D ranks of a data group, which share every batch of
    a single task; D may differ between tasks. Every rank has a task.
    """

    assignment: Assignment
    world_size: int  # W
    rank: int

    @property
    def tasks(self) -> int:
        """T."""
        return len(self.assignment)

    @cached_property
    def local_tasks(self) -> tuple[int, ...]:
        """This rank's tasks, ascending."""
        return tuple(task for task, ranks in enumerate(self.assignment) if self.rank in ranks)

    @property
    def data_group(self) -> tuple[int, ...]:
        """The ranks that share this rank's task, itself included."""
        return self.assignment[self.local_tasks[0]]

    @property
    def data_rank(self) -> int:
        """0 .. D - 1."""
        return self.data_group.index(self.rank)

    @property
    def data_ranks(self) -> int:
        """D."""
        return len(self.data_group)

    @property
    def contributes(self) -> bool:
        """Whether this rank's theta enters the mean: only the first rank of a data group, as all hold the same bits."""
        return self.data_rank == 0


def even_assignment(tasks: int, world_size: int) -> Assignment:
    """Equal loads for equal tasks: contiguous blocks of tasks per rank, or D neighbouring ranks per task.

    Raises:
        ValueError: W > T and T does not divide W.
    """
    if world_size <= tasks:
        return tuple((((task + 1) * world_size - 1) // tasks,) for task in range(tasks))
    if world_size % tasks:
        raise ValueError(
            f"{tasks} tasks do not fit evenly on {world_size} ranks: start at most {tasks} ranks, or a multiple of "
            f"{tasks} such as {world_size // tasks * tasks} or {(world_size // tasks + 1) * tasks}"
        )
    size = world_size // tasks
    return tuple(tuple(range(task * size, (task + 1) * size)) for task in range(tasks))


def place(tasks: int, world_size: int, rank: int) -> Placement:
    """The even placement, seen from `rank`; needs no process group.

    Raises:
        ValueError: W > T and T does not divide W.
    """
    return Placement(even_assignment(tasks, world_size), world_size, rank)


def data_group(placement: Placement, timeout_seconds: float = 120) -> dist.ProcessGroup | None:
    """The process group of the ranks that share this rank's task; None if no other rank does.

    Collective: every rank calls this.
    """
    groups = [list(ranks) for ranks in placement.assignment if len(ranks) > 1]  # the same order on all ranks
    if not groups:
        return None
    return dist.new_subgroups_by_enumeration(groups, timeout=timedelta(seconds=timeout_seconds))[0]


def describe_ranks(assignment: Assignment, names: Sequence[str], ranks: Iterable[int]) -> str:
    """Ranks with their tasks: `rank 1 (task b), rank 2 (task c)`."""
    tasks = {rank: [name for name, own in zip(names, assignment, strict=True) if rank in own] for rank in ranks}
    return ", ".join(f"rank {rank} (task {', '.join(own)})" for rank, own in tasks.items())
