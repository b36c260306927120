"""Shared by the benchmarks: random tasks, learners on them, the same step in plain PyTorch, and starting ranks."""

import argparse
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_cts import models
from dist_cts.algorithms.table import ALGORITHMS
from dist_cts.data.batches import DataConfig, TaskBatches
from dist_cts.distributed.numerics import PRECISION_HELP, Precision, set_numerics
from dist_cts.distributed.placement import Placement, place
from dist_cts.distributed.process_group import overlapping_groups, process_group, select_device
from dist_cts.distributed.reducer import MetaReducer, Wire, collectives
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
        self.manifest = SimpleNamespace(name="noise", count=count, classes=classes, pixels=pixels, sha256="noise")
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


@dataclass(frozen=True)
class Numerics:
    """What every competitor computes with: the keys of the same names in a run's configuration, with their defaults."""

    precision: Precision = "fp32"
    channels_last: bool = False
    deterministic: bool = True

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """--precision, --channels-last and --no-deterministic."""
        parser.add_argument("--precision", choices=get_args(Precision), default="fp32", help=PRECISION_HELP)
        parser.add_argument("--channels-last", action="store_true", help="memory format of images and weights")
        parser.add_argument(
            "--no-deterministic",
            action="store_true",
            help="allow a GPU's nondeterministic kernels, for every competitor",
        )

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Numerics":
        """What the command line says."""
        return cls(args.precision, args.channels_last, not args.no_deterministic)

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype of matrix products where it is not that of the weights."""
        return torch.bfloat16 if self.precision == "bf16" else None

    @property
    def memory_format(self) -> torch.memory_format:
        """Of images and weights."""
        return torch.channels_last if self.channels_last else torch.contiguous_format


DEFAULT = Numerics()


def parse_graph(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """The parsed arguments, --graph among them."""
    parser.add_argument("--graph", action="store_true", help="also time CTS with step=graph, on a GPU")
    args = parser.parse_args(arguments)
    if args.graph and args.device != "cuda":
        parser.error(f"--graph needs --device cuda, not {args.device}")
    return args


def make_batches(noise: Noise, batch_size: int, numerics: Numerics = DEFAULT) -> TaskBatches:
    """Augmented batches, as in a run."""
    return TaskBatches(noise, 0, batch_size, DataConfig(), channels_last=numerics.channels_last)


def make_model(noise: Noise, model: str, numerics: Numerics = DEFAULT) -> tuple[nn.Module, str]:
    """The model on the device, and the name of its head."""
    module, head = models.build(ModelConfig(name=model), noise.manifest.classes, 0)
    return module.to(noise.device, memory_format=numerics.memory_format), head


def make_learner(noise: Noise, model: str, batch_size: int, numerics: Numerics = DEFAULT) -> TaskLearner:
    """A learner, built as in a run."""
    batches = make_batches(noise, batch_size, numerics)
    return TaskLearner("noise", *make_model(noise, model, numerics), batches, INNER, autocast=numerics.autocast)


class PlainTask:
    """The same model, data, precision and SGD in plain PyTorch: one tensor per parameter, no communication."""

    def __init__(self, noise: Noise, model: str, batch_size: int, numerics: Numerics = DEFAULT) -> None:
        self.batches = make_batches(noise, batch_size, numerics)
        self.model, self.numerics = make_model(noise, model, numerics)[0], numerics
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=INNER.lr, momentum=INNER.momentum, weight_decay=INNER.weight_decay, fused=True
        )

    def step(self) -> None:
        images, labels = self.batches.next()
        self.optimizer.zero_grad()
        autocast = self.numerics.autocast
        with torch.autocast(images.device.type, autocast, enabled=autocast is not None):
            outputs = self.model(images)
        nn.functional.cross_entropy(outputs.float(), labels).backward()
        self.optimizer.step()


class MetaTraining:
    """A method with the real loop, one step per call, for this rank's learners; the episode never ends."""

    def __init__(
        self,
        learners: list[TaskLearner],
        tasks: int,
        placement: Placement | None = None,
        algorithm: str = "cts",
        delay: int = 0,
        wire: Wire = "fp32",
    ) -> None:
        """phi is the first learner's theta, equal on every rank. `tasks`: T over all ranks. Collective."""
        self.learners, self.progress = learners, Progress(FOREVER)
        self.phi: Tensor = learners[0].theta.clone()
        placement = placement or place(tasks, dist.get_world_size(), dist.get_rank())
        groups = overlapping_groups(self.phi.device, (delay + 1) * collectives(wire), 120)
        self.reducer = MetaReducer(self.phi, learners, placement, wire=wire, delay=delay, groups=groups)
        self.algorithm = ALGORITHMS[algorithm]

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


def on_ranks(
    world_size: int, device: str, function: Callable[..., Any], *args: Any, numerics: Numerics = DEFAULT
) -> Any:
    """Runs function(device, *args) on `world_size` ranks of one process group and returns rank 0's result.

    `numerics` are set for all ranks and this process. One rank runs in this process. Under torchrun the existing ranks
    run it, and ranks above 0 get None. CPU ranks share this machine's cores.
    """
    apply(numerics, device)  # here, too: the results say what was set
    if "RANK" in os.environ or world_size == 1:
        with process_group(picked := select_device(device), 120):
            result = function(picked, *args)
            return result if dist.get_rank() == 0 else None
    share_cores(world_size)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world_size, port, device, Path(folder), numerics, function, args)
        torch.multiprocessing.start_processes(_rank, arguments, nprocs=world_size, start_method="forkserver")
        return torch.load(Path(folder) / "result.pt", weights_only=False)


def apply(numerics: Numerics, device: str) -> None:
    """Sets this process's flags, before it uses the device and joins a process group."""
    set_numerics(torch.device(device), numerics.precision, numerics.deterministic)


def _rank(
    rank: int,
    world_size: int,
    port: int,
    device: str,
    folder: Path,
    numerics: Numerics,
    function: Callable[..., Any],
    args: tuple,
) -> None:
    """One rank, with the environment that torchrun would set."""
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ |= {name: str(value) for name, value in here.items()}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    share_cores(world_size)
    apply(numerics, device)
    with process_group(picked := select_device(device), 120):
        result = function(picked, *args)
        if rank == 0:
            torch.save(result, folder / "result.pt")
    exit_process(0)
