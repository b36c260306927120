"""A task whose batches are your own: a function of the step, or an iterable, as a row of DATASETS.

    def draw(generator, batch_size):
        x = torch.rand(batch_size, 1, generator=generator)
        return x, torch.sin(x)

    DATASETS["sine"] = Stream(draw, test=[(grid, torch.sin(grid))], classes=1)

A batch is a pair (inputs, targets): inputs a tensor, or a tuple or dict of tensors; targets a tensor. The first
dimension of each is the examples.
"""

import inspect
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from dist_cts.data.datasets import move
from dist_cts.data.samples import Batch
from dist_cts.errors import RankError
from dist_cts.seeds import hashed_seed

PARAMETERS = ("step", "generator", "batch_size")


@dataclass(frozen=True)
class Stream:
    """A task of ready-made batches.

    Args:
        train: one of
            a function of `step`, `generator` and `batch_size`, or of some of them by name. The generator, on the CPU,
            is seeded from seed, task and step: a function that draws from nothing else is resumed bit-identically;
            an iterable of batches, repeated without end; a resume reads and skips those before its step;
            an object with `next()` and `seek(step)`.
        test: the batches of the test split, every one once; None: the task cannot be tested.
        classes: the outputs of the task's head; 1 for regression on one value.
        fingerprint: a string that changes with the content; a run is not resumed on other data.
    """

    train: Any
    test: Iterable[tuple[Any, Tensor]] | None = None
    classes: int | None = None
    fingerprint: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.train, Iterator):  # its first batch, seen before the first step, must not be lost
            object.__setattr__(self, "train", _Repeated(self.train))
        if isinstance(self.test, Iterator):
            raise ValueError("the test batches are read several times: give a list or a DataLoader, not an iterator")


class StreamBatches:
    """The endless training batches of a stream; with D data ranks, rank r returns the r-th of D equal parts of each.

    Raises:
        ValueError: `train` is none of what Stream takes, or a function with other parameters.
    """

    def __init__(
        self,
        stream: Stream,
        name: str,
        seed: int,
        batch_size: int,
        *,
        device: torch.device | str = "cpu",
        data_rank: int = 0,
        data_ranks: int = 1,
        channels_last: bool = False,
    ) -> None:
        self.name, self.step, self.wait_seconds, self.fingerprint = name, 0, 0.0, stream.fingerprint
        self._part = data_rank, data_ranks
        self._move = partial(move, device=torch.device(device), channels_last=channels_last)
        self._at = _by_step(stream.train, name, seed, batch_size)

    def next(self) -> tuple[Any, Tensor]:
        """Inputs and targets of step `step`, on the device; then advances `step`.

        Raises:
            RankError: the batch does not exist, is not a pair, or cannot be split over the data ranks.
        """
        started = time.perf_counter()
        batch, (rank, ranks) = _pair(self._at(self.step), self.name), self._part
        if ranks > 1:
            size = len(batch.targets)
            if size % ranks:
                raise RankError(f"task {self.name}: a batch of {size} cannot be shared by its {ranks} data ranks")
            part = slice(rank * size // ranks, (rank + 1) * size // ranks)
            batch = Batch(*tree_map(lambda tensor: tensor[part], (batch.inputs, batch.targets)))
        self.wait_seconds += time.perf_counter() - started
        self.step += 1
        return self._move(batch)

    def seek(self, step: int) -> None:
        """Sets the step of the next batch."""
        self.step = step

    def close(self) -> None:
        """Nothing to close."""


class StreamSplit:
    """The train or test split of a task that is a stream.

    Raises:
        ValueError: it has no test batches.
    """

    def __init__(self, stream: Stream, name: str, split: str, device: torch.device) -> None:
        self.stream, self.name, self.device = stream, name, device
        self.classes, self.fingerprint = stream.classes, stream.fingerprint
        if split == "test" and stream.test is None:
            raise ValueError(f"task {name}: it has no test batches; give its Stream `test`, a list of batches")

    @property
    def labels(self) -> np.ndarray:
        """Always a ValueError: ready-made batches have no samples to choose a subset from."""
        raise ValueError(f"task {self.name}: its batches are ready-made; leave out train_limit and protocol")

    @property
    def example(self) -> Any:
        """The inputs of two examples (of one twice, if a batch holds one)."""
        inputs, targets = next(iter(self.test_batches(2))) if self.stream.test else self.batches(0, 2).next()
        return tree_map(lambda tensor: tensor[[0, min(1, len(targets) - 1)]], inputs)

    def batches(self, seed: int, batch_size: int, *, indices: None = None, **options: Any) -> StreamBatches:
        """The training batches; `options` are those of StreamBatches."""
        return StreamBatches(self.stream, self.name, seed, batch_size, device=self.device, **options)

    def test_batches(self, batch_size: int, indices: None = None) -> Iterator[tuple[Any, Tensor]]:
        """Every test batch once, as it is."""
        for batch in self.stream.test:
            yield move(_pair(batch, self.name), self.device)


def _pair(batch: Any, name: str) -> Batch:
    if not (isinstance(batch, tuple | list) and len(batch) == 2):
        raise RankError(f"task {name}: a batch must be a pair (inputs, targets), not a {type(batch).__name__}")
    return Batch(*tree_map(torch.as_tensor, tuple(batch)))


def _by_step(train: Any, name: str, seed: int, batch_size: int) -> Callable[[int], Any]:
    """The batch of every step."""
    if hasattr(train, "next") and hasattr(train, "seek"):
        return _Sought(train).at
    if callable(train):
        return _function(train, name, seed, batch_size)
    if isinstance(train, Iterable):
        train = _Repeated(train)
    if isinstance(train, _Repeated):
        return partial(train.at, name=name)
    raise ValueError(f"task {name}: train={train!r} is neither a function nor an iterable, and has no next and seek")


def _function(function: Callable, name: str, seed: int, batch_size: int) -> Callable[[int], Any]:
    parameters = inspect.signature(function).parameters
    if unknown := [key for key, p in parameters.items() if key not in PARAMETERS and p.default is p.empty]:
        known = ", ".join(PARAMETERS)
        raise ValueError(f"task {name}: the parameters of its function may be {known}, not {unknown[0]!r}")

    def at(step: int) -> Any:
        generator = torch.Generator().manual_seed(hashed_seed(seed, name, step))
        given = {"step": step, "generator": generator, "batch_size": batch_size}
        return function(**{key: given[key] for key in parameters if key in given})

    return at


class _Sought:
    """The batches of an object with `next` and `seek`."""

    def __init__(self, batches: Any) -> None:
        self.batches, self.position = batches, -1

    def at(self, step: int) -> Any:
        if step != self.position:
            self.batches.seek(step)
        self.position = step + 1
        return self.batches.next()


class _Repeated:
    """The batches of an iterable, by number: from its start again when it ends, or to go back."""

    def __init__(self, iterable: Iterable) -> None:
        self.iterable, self.iterator = iterable, iter(iterable)
        self.position, self.latest = 0, None

    def at(self, step: int, name: str) -> Any:
        if step < self.position - 1:
            self._restart(name, "cannot go back")
            self.position = 0
        while step >= self.position:
            self.latest = next(self.iterator, None)
            if self.latest is None:
                self._restart(name, "ended")
                self.latest = next(self.iterator, None)
            if self.latest is None:
                raise RankError(f"task {name}: its iterable has no batch")
            self.position += 1
        return self.latest

    def _restart(self, name: str, why: str) -> None:
        if self.iterator is self.iterable:
            raise RankError(
                f"task {name}: its iterator {why} after {self.position} batches; "
                "give a list, a DataLoader or a function of the step"
            )
        self.iterator = iter(self.iterable)
