"""What the benchmarks train: tasks of noise, learners on them, the same step in plain PyTorch, and ranks to run on."""

import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_cts import models
from dist_cts.algorithms.table import ALGORITHMS
from dist_cts.data import beton
from dist_cts.data.batches import DataConfig, TaskBatches, open_task
from dist_cts.distributed.placement import Placement, place
from dist_cts.distributed.process_group import process_group, select_device
from dist_cts.distributed.reducer import MetaReducer
from dist_cts.learner import InnerConfig, TaskLearner
from dist_cts.meta_train import meta_train
from dist_cts.models import ModelConfig
from dist_cts.progress import Progress
from dist_cts.run.exit_codes import exit_process
from dist_cts.state import TrainState

INNER = InnerConfig()  # SGD as in the paper's section 4.2, for every competitor
FOREVER = 10**9  # inner steps of an episode that no benchmark ends


def noise_task(folder: Path, *, pixels: int, count: int = 1024, classes: int = 10) -> Path:
    """A prepared task of random images; what a step costs does not depend on what they show."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (count, pixels, pixels, 3), dtype=np.uint8)
    names = [str(label) for label in range(classes)]
    beton.write(folder / "train", images, np.arange(count) % classes, names, pixels=pixels, source="noise")
    return folder


def make_batches(folder: Path, batch_size: int, device: torch.device) -> TaskBatches:
    """Batches of a prepared task, its images in device memory."""
    config = DataConfig(cache="device", verify=False)
    return TaskBatches(open_task(folder, "train", config, device), 0, batch_size, config)


def make_learner(folder: Path, model: str, batch_size: int, device: torch.device) -> TaskLearner:
    """A learner as a run builds it."""
    batches = make_batches(folder, batch_size, device)
    module, head = models.build(ModelConfig(name=model), batches.source.manifest.classes, 0)
    return TaskLearner(folder.name, module.to(device), head, batches, INNER)


class PlainTask:
    """The same model, data and SGD in plain PyTorch: parameters apart, no communication."""

    def __init__(self, folder: Path, model: str, batch_size: int, device: torch.device) -> None:
        self.batches = make_batches(folder, batch_size, device)
        self.model = models.build(ModelConfig(name=model), self.batches.source.manifest.classes, 0)[0].to(device)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=INNER.lr, momentum=INNER.momentum, weight_decay=INNER.weight_decay, fused=True
        )

    def step(self) -> None:
        images, labels = self.batches.next()
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(images), labels).backward()
        self.optimizer.step()


class MetaTraining:
    """Continual trajectory shifting by the real loop, a step at a time: this rank's learners among T tasks."""

    def __init__(self, learners: list[TaskLearner], tasks: int, placement: Placement | None = None) -> None:
        """Takes phi from the first learner; every rank builds the same one. `tasks`: T, of all ranks, placed evenly."""
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
    """Waits for the device; what was timed before has then been done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def finish(device: torch.device, step: Callable[[], object], times: int = 1) -> None:
    """Takes a step some times and waits until every rank has: the slowest one's time is the time."""
    for _ in range(times):
        step()
    synchronise(device)
    dist.barrier()


def share_cores(world_size: int) -> None:
    """Gives torch this process's share of the cores."""
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world_size))


def on_ranks(world_size: int, device: str, function: Callable[..., Any], *args: Any) -> Any:
    """What rank 0 returns of function(device, *args), run by `world_size` processes that share a process group.

    A single rank is this process. Under torchrun, the ranks that it started run it, and those above 0 get None. CPU
    ranks share this machine's cores.
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
        torch.multiprocessing.start_processes(_rank, arguments, nprocs=world_size, start_method="spawn")
        return torch.load(Path(folder) / "result.pt", weights_only=False)


def _rank(
    rank: int, world_size: int, port: int, device: str, folder: Path, function: Callable[..., Any], args: tuple
) -> None:
    """One process, with what torchrun would have told it."""
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ |= {name: str(value) for name, value in here.items()}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    share_cores(world_size)
    with process_group(picked := select_device(device), 120):
        result = function(picked, *args)
        if rank == 0:
            torch.save(result, folder / "result.pt")
    exit_process(0)
