"""A split of a task, opened by the task's name: a row of DATASETS, or the .beton file of a prepared task."""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dist_cts.data.batches import DataConfig, TaskBatches, open_task, test_batches
from dist_cts.data.datasets import DATASETS, DatasetBatches, DatasetSplit
from dist_cts.data.source import Source
from dist_cts.data.streams import Stream, StreamBatches, StreamSplit


class Split(Protocol):
    """The train or test split of a task; `labels`: int64 [N], classes to balance a subset over."""

    classes: int | None  # outputs of the task's head
    labels: np.ndarray
    fingerprint: str

    @property
    def example(self) -> Any:
        """The inputs of two examples, to try a model on."""

    def batches(
        self,
        seed: int,
        batch_size: int,
        *,
        data_rank: int = 0,
        data_ranks: int = 1,
        channels_last: bool = False,
        indices: np.ndarray | None = None,
    ) -> TaskBatches | DatasetBatches | StreamBatches:
        """The endless stream of training batches of this data rank, from the samples `indices`; None: all."""

    def test_batches(self, batch_size: int, indices: np.ndarray | None = None) -> Iterator[tuple[Any, Tensor]]:
        """Every sample, or every one of `indices`, once and in order, without augmentation."""


@dataclass(frozen=True)
class PreparedSplit:
    """The images of a .beton file."""

    source: Source
    config: DataConfig

    @property
    def classes(self) -> int:
        return self.source.manifest.classes

    @property
    def labels(self) -> np.ndarray:
        return self.source.labels

    @property
    def fingerprint(self) -> str:
        return self.source.manifest.sha256

    @property
    def example(self) -> Tensor:
        pixels = self.source.manifest.pixels
        return torch.zeros(2, 3, pixels, pixels, device=self.source.device)

    def batches(self, seed: int, batch_size: int, **options: Any) -> TaskBatches:
        return TaskBatches(self.source, seed, batch_size, self.config, **options)

    def test_batches(self, batch_size: int, indices: np.ndarray | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        return test_batches(self.source, batch_size, self.config, indices)


def open_split(name: str, split: str, config: DataConfig, device: torch.device) -> Split:
    """Opens the train or test split of a task; a registered dataset comes before a prepared task of the same name.

    Raises:
        FileNotFoundError: there is no task of this name; names the nearest ones.
        ValueError, ImportError: as of `open_task` and DatasetSplit.
    """
    if isinstance(DATASETS.get(name), Stream):
        return StreamSplit(DATASETS[name], name, split, device)
    if name in DATASETS:
        return DatasetSplit(name, split, config.dataset_workers, device)
    folder = config.root / name
    if not folder.is_dir():
        prepared = [path.name for path in config.root.iterdir() if path.is_dir()] if config.root.is_dir() else []
        near = difflib.get_close_matches(name, {*prepared, *DATASETS}, n=3)
        make = "prepare it with `dist-cts prepare`, or --import the module that registers it"
        hint = f"did you mean {' or '.join(near)}?" if near else make
        raise FileNotFoundError(
            f"task {name!r}: there is no folder {folder} and no dataset of this name is registered; {hint}"
        )
    return PreparedSplit(open_task(folder, split, config, device), config)


def check_prepared(split: Split, name: str) -> None:
    """Raises ValueError unless few-shot tasks can be drawn from the split."""
    if not isinstance(split, PreparedSplit):
        raise ValueError(f"task {name}: few_shot draws from prepared tasks only; make one with `dist-cts prepare`")


def outputs(split: Split, name: str, expected: int | None = None) -> int:
    """The outputs of the task's head: as the data say, or as `expected` by the config.

    Raises:
        ValueError: both say something else, or neither says anything.
    """
    if split.classes is None and expected is None:
        raise ValueError(
            f"task {name}: the number of outputs is unknown; give its dataset the attribute `classes`, a number or a "
            f"list of names (for meta-training also {{name: {name}, classes: N}} in the config)"
        )
    if None not in (split.classes, expected) and split.classes != expected:
        raise ValueError(f"task {name}: the config says {expected} classes, its data have {split.classes}")
    return split.classes or expected
