"""Tasks from map-style PyTorch datasets: the table DATASETS, and their batches in the order of the SamplePlan.

    DATASETS["birds"] = Birds                       # Birds("train") and Birds("test") are datasets
    DATASETS["news"] = HuggingFace("ag_news", ...)  # see hugging_face.py

A sample is a pair (inputs, target). `inputs` may be a tensor, or a tuple or dict of tensors, which the model receives
as one argument; `target` is one tensor. Arrays, numbers and lists of numbers become tensors; dtypes are kept.

A dataset's random transforms draw from the global generators of Python, NumPy or torch, which are seeded per sample.
Optional attributes of a dataset:
    classes      the outputs of the task's head: their number, or a list of names; 1 for regression on one value
    targets      the target of every sample, for class-balanced subsets (else they are read from the samples)
    fingerprint  a string that changes with the content; a run is not resumed on other data
"""

import itertools
import time
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import Dataset, IterableDataset

from dist_cts.data.loader import Loader
from dist_cts.data.plan import SamplePlan
from dist_cts.data.samples import Batch, Row

CHUNK_STEPS = 256  # steps whose plan is computed at once

Open = Callable[[str], Dataset]  # from a split, train or test
# By task name: an Open, or a Stream of ready-made batches (streams.py).
DATASETS: dict[str, Any] = {}
_opened: dict[tuple[str, str], tuple[Open, Dataset]] = {}


class DatasetBatches:
    """The endless stream of one task's training batches; `step`, the number of the next one, is the only state.

    With D data ranks, rank r loads and returns samples r * B / D to (r + 1) * B / D - 1 of every batch. The bits of a
    batch depend on dataset, seed, name, batch size and step, not on `workers` or the layout.

    Args:
        workers: processes that load ahead; 0: this process loads.
        indices: int64, the samples to use; None for all.

    Raises:
        ValueError: the dataset is empty or not map-style, or the batch size is not divisible by the data ranks.
    """

    def __init__(
        self,
        dataset: Dataset,
        name: str,
        seed: int,
        batch_size: int,
        *,
        workers: int = 0,
        device: torch.device | str = "cpu",
        data_rank: int = 0,
        data_ranks: int = 1,
        channels_last: bool = False,
        indices: np.ndarray | None = None,
    ) -> None:
        if batch_size % data_ranks:
            raise ValueError(f"task {name}: batch_size={batch_size} is not divisible by its {data_ranks} data ranks")
        self.step, self.wait_seconds = 0, 0.0
        self.fingerprint = fingerprint(dataset, name)
        count = length(dataset, name) if indices is None else len(indices)
        self.plan = SamplePlan(seed, name, count, batch_size, padding=0, flip=False)
        self._indices = indices
        size = batch_size // data_ranks
        self._slice = slice(data_rank * size, (data_rank + 1) * size)
        self._move = partial(move, device=torch.device(device), channels_last=channels_last)
        self._loader = Loader(
            dataset, self._rows(0), name=name, keys=(seed, name, "sample"), workers=workers, device=torch.device(device)
        )

    def next(self) -> tuple[Any, Tensor]:
        """Inputs and targets of step `step`, on the device, with a first dimension of B / D; then advances `step`.

        Raises:
            RankError: a sample cannot be loaded, or a worker died or is stuck; names task, step and sample.
        """
        started = time.perf_counter()
        batch = self._loader.take()
        self.wait_seconds += time.perf_counter() - started
        self.step += 1
        return self._move(batch)

    def seek(self, step: int) -> None:
        """Sets the step of the next batch; any batch can be replayed. The workers stay."""
        self._loader.restart(self._rows(step))
        self.step = step

    def close(self) -> None:
        """Ends the workers, if there are any; `next` starts new ones."""
        self._loader.close()
        self._loader.restart(self._rows(self.step))

    def _rows(self, start: int) -> Iterator[Row]:
        """This data rank's part of the plan from step `start` on, without end."""
        for first in itertools.count(start, CHUNK_STEPS):
            index = self.plan.chunk(first, CHUNK_STEPS).index
            index = index if self._indices is None else self._indices[index]
            for offset, row in enumerate(index[:, self._slice]):
                step = first + offset
                position = range(step * self.plan.batch_size, (step + 1) * self.plan.batch_size)[self._slice]
                yield Row(step, row.tolist(), list(position))


class DatasetSplit:
    """The train or test split of the task `name` in DATASETS. The dataset is created once per process.

    Raises:
        ValueError: unknown split, or not a map-style dataset.
    """

    def __init__(self, name: str, split: str, workers: int, device: torch.device) -> None:
        self.name, self.split, self.workers, self.device = name, split, workers, device
        open_split = DATASETS[name]
        opened, self.dataset = _opened.get((name, split), (None, None))
        if opened is not open_split:
            self.dataset = open_split(split)
            _opened[name, split] = open_split, self.dataset
        self.count = length(self.dataset, f"{name}, split {split}")
        self.fingerprint = fingerprint(self.dataset, name)

    @property
    def classes(self) -> int | None:
        """The outputs of the task's head; None if the dataset does not say."""
        classes = getattr(self.dataset, "classes", None)
        return len(classes) if hasattr(classes, "__len__") else classes

    @cached_property
    def labels(self) -> np.ndarray:
        """int64 [N]: the targets if they are integers; otherwise all zero, one class."""
        targets = getattr(self.dataset, "targets", None)
        if targets is None:
            targets = torch.cat([targets.cpu() for _, targets in self.test_batches(256)])
        targets = np.asarray(targets)
        is_class = targets.shape == (self.count,) and targets.dtype.kind in "biu"
        return targets.astype(np.int64) if is_class else np.zeros(self.count, np.int64)

    @property
    def example(self) -> Any:
        """The inputs of the first two samples (of one sample twice, if there is only one)."""
        rows = iter([Row(0, [0, min(1, self.count - 1)], [0, 1])])
        loader = Loader(
            self.dataset, rows, name=self.name, keys=(self.name, self.split, "sample"), workers=0, device=self.device
        )
        return move(loader.take(), self.device)[0]

    def batches(self, seed: int, batch_size: int, **options: Any) -> DatasetBatches:
        """The training batches; `options` are those of DatasetBatches."""
        return DatasetBatches(
            self.dataset, self.name, seed, batch_size, workers=self.workers, device=self.device, **options
        )

    def test_batches(self, batch_size: int, indices: np.ndarray | None = None) -> Iterator[tuple[Any, Tensor]]:
        """Every sample, or every one of `indices`, once and in order. The same bits at every call.

        Raises:
            RankError: as of DatasetBatches.next.
        """
        samples = list(range(self.count)) if indices is None else indices.tolist()
        starts = range(0, len(samples), batch_size)
        ranges = (samples[start : start + batch_size] for start in starts)
        loader = Loader(
            self.dataset,
            (Row(step, index, index) for step, index in enumerate(ranges)),
            name=f"{self.name}, {self.split} split",
            keys=(self.name, self.split, "sample"),
            workers=self.workers,
            device=self.device,
        )
        try:
            for _ in starts:
                yield move(loader.take(), self.device)
        finally:
            loader.close()


def length(dataset: Dataset, name: str) -> int:
    """The number of samples.

    Raises:
        ValueError: the dataset is not map-style, or empty.
    """
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ValueError(
            f"task {name}: expected a map-style dataset, with __len__ and __getitem__, found {type(dataset).__name__}"
        )
    if not len(dataset):
        raise ValueError(f"task {name}: its dataset is empty")
    return len(dataset)


def fingerprint(dataset: Dataset, name: str) -> str:
    """What a checkpoint remembers of a dataset: its length, and its `fingerprint` if it has one."""
    return f"{length(dataset, name)} samples {getattr(dataset, 'fingerprint', '')}".strip()


def move(batch: Batch, device: torch.device, channels_last: bool = False) -> tuple[Any, Tensor]:
    """Inputs and targets on the device; the copies are queued and the host does not wait for them."""

    def moved(tensor: Tensor) -> Tensor:
        tensor = tensor.to(device, non_blocking=True)
        is_image = channels_last and tensor.ndim == 4
        return tensor.contiguous(memory_format=torch.channels_last) if is_image else tensor

    return tree_map(moved, batch.inputs), batch.targets.to(device, non_blocking=True)
