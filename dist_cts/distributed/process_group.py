"""The process group: device, rendezvous, and checks between ranks."""

import hashlib
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dist_cts.distributed.malloc import keep_freed_memory
from dist_cts.distributed.peer_failure import within
from dist_cts.errors import RunError, UnreachableError, on_all_ranks
from dist_cts.flat import FlatLayout

T = TypeVar("T")


def select_device(name: str) -> torch.device:
    """Selects and initializes the device: `cpu`, `cuda`, or `auto`, the GPU if every local rank has one.

    Raises:
        ValueError: `cuda` with fewer GPUs than local ranks.
    """
    ranks, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if name == "cpu" or (name == "auto" and gpus < ranks):
        keep_freed_memory()
        return torch.device("cpu")
    if gpus < ranks:
        raise ValueError(
            f"device=cuda: {ranks} ranks but {gpus} GPUs on this node; start one rank per GPU, or set device=cpu"
        )
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def backend_timeout(device: torch.device, timeout_seconds: float) -> float:
    """The timeout in seconds to give a process group, so that a lost peer is noticed after `timeout_seconds`.

    NCCL's timeout must be longer than that of `wait_for_gpu`: its watchdog aborts without naming the lost rank.
    """
    return timeout_seconds + (60 if device.type == "cuda" else 0)


@contextmanager
def process_group(device: torch.device, timeout_seconds: float) -> Iterator[None]:
    """Joins torchrun's process group: gloo for CPU tensors and objects, NCCL for GPU tensors.

    Without torchrun, creates a group of one rank. Objects do not go through NCCL: receiving one from a lost peer would
    block without a timeout. A group of several ranks is destroyed only on success: after a failure that could block.

    Raises:
        RunError: a rank did not join in time.
    """
    timeout = timedelta(seconds=backend_timeout(device, timeout_seconds))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # on one node, the host name need not resolve
    if "RANK" in os.environ:
        device_id = device if device.type == "cuda" else None
        shared, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        try:  # its own errors, which name a rank, come first
            prefix = within(timeout.total_seconds() + 5, lambda: _attempt(shared, rank, world_size, timeout))
        except TimeoutError:
            raise UnreachableError(
                f"torchrun's store has not responded for {timeout.total_seconds() + 5:g} s"
            ) from None
        store = dist.PrefixStore(prefix, shared)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=timeout, device_id=device_id
        )
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    try:
        yield
    except BaseException:
        if dist.get_world_size() == 1:  # keeps a notebook usable
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _attempt(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """An identifier of this launch of the ranks, drawn by rank 0; it prefixes all keys of the process group.

    torchrun keeps its store across restarts, with the addresses of dead processes; a rank that reads a stale address
    hangs. Protocol: every rank > 0 writes a greeting with a random token and accepts only an answer that repeats it;
    rank 0 answers until every rank has confirmed.

    Raises:
        RunError: a rank did not join in time.
    """
    mine, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()

    def read(key: str) -> str:
        return store.get(key).decode() if store.check([key]) else ""

    def wait_for(missing: int) -> None:
        if time.monotonic() > deadline:
            raise RunError(f"rank {missing} did not join within {timeout.total_seconds():g} s", rank)
        time.sleep(0.05)

    if rank > 0:
        store.set(f"greeting/{rank}", mine)
        while not (answer := read(f"answer/{rank}")).startswith(mine):
            wait_for(0)
        attempt = answer.removeprefix(mine)
        store.set(f"heard/{attempt}/{rank}", "")
        return attempt
    missing = list(range(1, world_size))
    while missing:
        for other in missing:
            store.set(f"answer/{other}", read(f"greeting/{other}") + mine)
        missing = [other for other in missing if not store.check([f"heard/{mine}/{other}"])]
        if missing:
            wait_for(missing[0])
    return mine


def overlapping_groups(device: torch.device, reductions: int, timeout_seconds: float) -> list[dist.ProcessGroup | None]:
    """Process groups, the default one (None) first, that together run so many collectives at the same time.

    A group of gloo runs two, in threads that sleep while they wait. At most 16 groups, for the sockets. NCCL uses one
    group and runs one after another: concurrent communicators need care that no GPU has tested here. Collective.
    """
    more = 0 if device.type == "cuda" else min((reductions - 1) // 2, 15)
    timeout = timedelta(seconds=backend_timeout(device, timeout_seconds))
    return [None, *(dist.new_group(timeout=timeout) for _ in range(more))]


def gather(value: T) -> list[T]:
    """Every rank's value, in rank order, on every rank."""
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_rank_0(value: T) -> T:
    """Rank 0's value, on every rank."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """A block that raises an error of any rank on all ranks, so that none waits for a failed one.

    Collective: every rank enters and leaves the block.

    Raises:
        ValueError, OSError, ImportError: the lowest failing rank's error, prefixed with `rank R:` if not all failed.
    """
    error: Exception | None = None
    try:
        yield
    except (ValueError, OSError, ImportError) as caught:
        error = caught
    errors = gather(error)
    failed = [rank for rank, other in enumerate(errors) if other is not None]
    if not failed:
        return
    if len(failed) == len(errors):
        raise on_all_ranks(errors[0])
    raise on_all_ranks(type(errors[failed[0]])(f"rank {failed[0]}: {errors[failed[0]]}"))


def check_layouts(layout: FlatLayout) -> None:
    """Verifies that phi's layout is the same on all ranks, before any tensor is exchanged.

    Raises:
        ValueError: two ranks differ; the message names both and the first differing tensor.
    """
    prints = gather(layout.fingerprint())
    if len(set(prints)) == 1:
        return
    lines = gather(layout.lines())
    other = next(rank for rank, print_ in enumerate(prints) if print_ != prints[0])
    mine, theirs = lines[0], lines[other]
    for index in range(max(len(mine), len(theirs))):
        a, b = (side[index] if index < len(side) else "missing" for side in (mine, theirs))
        if a != b:
            raise on_all_ranks(
                ValueError(f"ranks 0 and {other} have different models: tensor {index} is {a}, on rank {other} {b}")
            )


def check_same_bits(vector: Tensor, step: int) -> None:
    """Verifies by a hash that a replicated vector is bit-identical on all ranks.

    Raises:
        RunError: a rank differs; the message names it.
    """
    hashes = gather(hashlib.sha256(vector.cpu().numpy().tobytes()).hexdigest())
    for rank, other in enumerate(hashes):
        if other != hashes[0]:
            raise RunError(
                f"step {step}: phi on rank {rank} differs from rank 0's; run the same command to resume "
                "from the newest checkpoint"
            )
