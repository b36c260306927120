"""Shared by the benchmarks: random tasks, learners on them, the same step in plain PyTorch, and starting ranks."""

import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_cts import models
from dist_cts.algorithms.table import ALGORITHMS
from dist_cts.data.batches import DataConfig, TaskBatches
from dist_cts.distributed.placement import Placement, place
from dist_cts.distributed.process_group import process_group, select_device
from dist_cts.distributed.reducer import MetaReducer
from dist_cts.learner import InnerConfig, TaskLearner
from dist_cts.meta_train import meta_train
from dist_cts.models import ModelConfig
from dist_cts.progress import Progress
from dist_cts.run.exit_codes import exit_process
from dist_cts.state import TrainState

INNER = InnerConfig()  # SGD as in section 4.2 of the paper, for every competitor
FOREVER = 10**9  # inner steps per episode, more than any benchmark takes


class Noise:
    """A source of random images in device memory: the cost of a step does not depend on their content."""

    def __init__(self, device: torch.device, *, pixels: int, count: int = 1024, classes: int = 10) -> None:
        """`images` is uint8 [count, pixels, pixels, 3], `labels` int64 [count]."""
        images = np.random.default_rng(0).integers(0, 256, (count, pixels, pixels, 3), dtype=np.uint8)
        self.manifest = SimpleNamespace(name="noise", count=count, classes=classes, pixels=pixels)
        self.device, self.labels = device, np.arange(count) % classes
        self.images = torch.from_numpy(images).to(device)

    def prefetch(self, rows: Iterator[np.ndarray], size: int, step: int = 0) -> "Noise":
        """Nothing to prepare."""
        return self

    def take(self, index: Tensor) -> Tensor:
        """uint8 [b, P, P, 3]."""
        return self.images.index_select(0, index)

    def close(self) -> None:
        """Nothing to close."""


def make_batches(noise: Noise, batch_size: int) -> TaskBatches:
    """Augmented batches, as in a run."""
    return TaskBatches(noise, 0, batch_size, DataConfig())


def make_learner(noise: Noise, model: str, batch_size: int) -> TaskLearner:
    """A learner, built as in a run."""
    module, head = models.build(ModelConfig(name=model), noise.manifest.classes, 0)
    return TaskLearner("noise", module.to(noise.device), head, make_batches(noise, batch_size), INNER)


class PlainTask:
    """The same model, data and SGD in plain PyTorch: one tensor per parameter, no communication."""

    def __init__(self, noise: Noise, model: str, batch_size: int) -> None:
        self.batches = make_batches(noise, batch_size)
        self.model = models.build(ModelConfig(name=model), noise.manifest.classes, 0)[0].to(noise.device)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=INNER.lr, momentum=INNER.momentum, weight_decay=INNER.weight_decay, fused=True
        )

    def step(self) -> None:
        images, labels = self.batches.next()
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(images), labels).backward()
        self.optimizer.step()


class MetaTraining:
    """Continual trajectory shifting with the real loop, one step per call, for this rank's learners."""

    def __init__(self, learners: list[TaskLearner], tasks: int, placement: Placement | None = None) -> None:
        """phi is the first learner's theta, equal on every rank. `tasks`: T over all ranks."""
        self.learners, self.progress = learners, Progress(FOREVER)
        self.phi: Tensor = learners[0].theta.clone()
        placement = placement or place(tasks, dist.get_world_size(), dist.get_rank())
        self.reducer = MetaReducer(self.phi, learners, placement)
        self.algorithm = ALGORITHMS["cts"]

    def step(self) -> None:
        """One step of Algorithm 2."""
        self.progress.stopping = False
        state = TrainState(self.phi, self.learners[0].flat.body_layout, self.learners, self.progress)
        meta_train(state, self.algorithm, self.reducer, beta=0.01, M=1, K=FOREVER, after_step=self._after_step)

    def _after_step(self) -> None:
        self.reducer.received()
        self.progress.stopping = True


def synchronise(device: torch.device) -> None:
    """Waits until the device has finished all work submitted so far."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def finish(device: torch.device, step: Callable[[], object], times: int = 1) -> None:
    """Takes `times` steps and waits for all ranks: the slowest rank determines the time."""
    for _ in range(times):
        step()
    synchronise(device)
    dist.barrier()


def share_cores(world_size: int) -> None:
    """Limits torch to this process's share of the cores."""
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world_size))


def on_ranks(world_size: int, device: str, function: Callable[..., Any], *args: Any) -> Any:
    """Runs function(device, *args) on `world_size` ranks of one process group and returns rank 0's result.

    One rank runs in this process. Under torchrun the existing ranks run it, and ranks above 0 get None. CPU ranks share
    this machine's cores.
    """
    if "RANK" in os.environ or world_size == 1:
        with process_group(picked := select_device(device), 120):
            result = function(picked, *args)
            return result if dist.get_rank() == 0 else None
    share_cores(world_size)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world_size, port, device, Path(folder), function, args)
        torch.multiprocessing.start_processes(_rank, arguments, nprocs=world_size, start_method="forkserver")
        return torch.load(Path(folder) / "result.pt", weights_only=False)


def _rank(
    rank: int, world_size: int, port: int, device: str, folder: Path, function: Callable[..., Any], args: tuple
) -> None:
    """One rank, with the environment that torchrun would set."""
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ |= {name: str(value) for name, value in here.items()}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    share_cores(world_size)
    with process_group(picked := select_device(device), 120):
        result = function(picked, *args)
        if rank == 0:
            torch.save(result, folder / "result.pt")
    exit_process(0)
