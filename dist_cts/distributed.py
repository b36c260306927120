"""The process group, and which task learners live on which rank."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from dist_cts.exit_codes import RunError
from dist_cts.flat import FlatLayout


@dataclass(frozen=True)
class Placement:
    """The seat of one rank in T tasks x W ranks.

    T = W: one learner a rank. T > W: contiguous blocks of learners a rank. W = D x T: D neighbouring ranks share one
    task's batch, `data_rank` 0 .. D - 1.
    """

    tasks: int  # T
    world_size: int  # W
    rank: int
    local_tasks: range
    data_rank: int = 0
    data_ranks: int = 1  # D

    @property
    def contributes(self) -> bool:
        """Whether this rank's theta counts in the mean: its data group's other ranks hold the same bits."""
        return self.data_rank == 0


def place(tasks: int, world_size: int, rank: int) -> Placement:
    """Seats `rank`; needs no process group.

    Raises:
        ValueError: more ranks than tasks, and not a multiple of them.
    """
    if world_size <= tasks:
        start, end = (rank * tasks // world_size, (rank + 1) * tasks // world_size)
        return Placement(tasks, world_size, rank, range(start, end))
    if world_size % tasks:
        raise ValueError(
            f"{tasks} tasks do not fit on {world_size} ranks: start at most {tasks} ranks, or a multiple of {tasks} "
            f"such as {world_size // tasks * tasks} or {(world_size // tasks + 1) * tasks}"
        )
    data_ranks = world_size // tasks
    task, data_rank = divmod(rank, data_ranks)
    return Placement(tasks, world_size, rank, range(task, task + 1), data_rank, data_ranks)


def pick_device(name: str) -> torch.device:
    """`cpu`, `cuda`, or `auto`: this local rank's GPU where every local rank has one, otherwise the CPU.

    Raises:
        ValueError: `cuda`, and fewer GPUs than local ranks.
    """
    ranks, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if name == "cpu" or (name == "auto" and gpus < ranks):
        return torch.device("cpu")
    if gpus < ranks:
        raise ValueError(
            f"device=cuda: {ranks} ranks on this node but {gpus} GPUs; start one rank a GPU, or set device=cpu"
        )
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


@contextmanager
def process_group(device: torch.device, timeout_seconds: float) -> Iterator[None]:
    """Joins torchrun's process group, NCCL for CUDA and gloo for the CPU; without torchrun, a group of one rank.

    The group is left only after success: after a failure the peers may be gone, and leaving could wait for them.
    """
    timeout = timedelta(seconds=timeout_seconds)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one node: a host name that resolves is not needed
    if "RANK" in os.environ:
        device_id = device if device.type == "cuda" else None
        dist.init_process_group(backend, timeout=timeout, device_id=device_id)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    yield
    dist.destroy_process_group()


def data_group(placement: Placement, device: torch.device) -> dist.ProcessGroup | None:
    """The ranks that share this rank's task, from a ("task", "data") mesh; None where each task has one rank."""
    if placement.data_ranks == 1:
        return None
    shape = (placement.tasks, placement.data_ranks)
    return init_device_mesh(device.type, shape, mesh_dim_names=("task", "data")).get_group("data")


@contextmanager
def together() -> Iterator[None]:
    """A block in which an error of one rank is raised on all of them, instead of leaving the others waiting.

    Raises:
        ValueError, OSError, ImportError: the lowest failing rank's error, its text starting with `rank R:` where only
            some ranks failed.
    """
    error: Exception | None = None
    try:
        yield
    except (ValueError, OSError, ImportError) as caught:
        error = caught
    errors: list[Exception | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    failed = [rank for rank, other in enumerate(errors) if other is not None]
    if not failed:
        return
    if len(failed) == len(errors):
        raise errors[0]
    raise type(errors[failed[0]])(f"rank {failed[0]}: {errors[failed[0]]}")


def check_layouts(layout: FlatLayout) -> None:
    """Compares phi's layout over all ranks; comes before any tensor is exchanged.

    Raises:
        ValueError: two ranks differ; both are named, with the first difference.
    """
    prints: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(prints, layout.fingerprint())
    if len(set(prints)) == 1:
        return
    lines: list[list[str]] = [[] for _ in prints]
    dist.all_gather_object(lines, layout.lines())
    other = next(rank for rank, print_ in enumerate(prints) if print_ != prints[0])
    mine, theirs = lines[0], lines[other]
    for index in range(max(len(mine), len(theirs))):
        a, b = (side[index] if index < len(side) else "nothing" for side in (mine, theirs))
        if a != b:
            raise ValueError(f"ranks 0 and {other} build different bodies: tensor {index} is {a} against {b}")


def check_same_bits(vector: Tensor, step: int) -> None:
    """Compares a replicated vector's bits over all ranks by their hashes.

    Raises:
        RunError: a rank differs; it is named.
    """
    mine = hashlib.sha256(vector.cpu().numpy().tobytes()).hexdigest()
    hashes: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(hashes, mine)
    for rank, other in enumerate(hashes):
        if other != hashes[0]:
            raise RunError(f"step {step}: phi on rank {rank} differs from rank 0's; restart from the newest checkpoint")
