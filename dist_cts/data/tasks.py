"""A split of a task, opened by the task's name: a row of DATASETS, or the .beton file of a prepared task."""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dist_cts.data.batches import DataConfig, TaskBatches, open_task, test_batches
from dist_cts.data.datasets import DATASETS, DatasetBatches, DatasetSplit
from dist_cts.data.manifest import read_manifest
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
    root = config.root.absolute()
    if not (root / name).is_dir():
        raise FileNotFoundError(_missing(name, root))
    if not [*(root / name).glob("*.beton"), *(root / name).glob("*.json")]:
        raise FileNotFoundError(
            f"{root / name} is not a prepared task; if it is a folder of images, prepare it: "
            f"dist-cts prepare image-folder --root {root / name} --out DIR, then set data.root=DIR"
        )
    return PreparedSplit(open_task(config.root / name, split, config, device), config)


def contents(name: str, config: DataConfig) -> list[str]:
    """Fingerprints of the train and test split of a task; reads no images of a prepared one."""
    if name in DATASETS:
        opened = [open_split(name, split, config, torch.device("cpu")) for split in ("train", "test")]
        return [getattr(split, "fingerprint", "") for split in opened]
    return [read_manifest(config.root / name / split).sha256 for split in ("train", "test")]


def _missing(name: str, root: Path) -> str:
    """The message for a missing task: the nearest prepared ones, and what to do."""
    if not root.is_dir():
        return f"no prepared task {name!r}: {root} does not exist; set data.root, or prepare it: dist-cts prepare"
    if (root / "train.beton").is_file():
        return f"no prepared task {name!r} in {root}, which is a task itself; set data.root={root.parent}"
    prepared = sorted(path.parent.name for path in root.glob("*/train.json"))
    near = difflib.get_close_matches(name, [*prepared, *DATASETS], n=3)
    hint = (
        f"did you mean {' or '.join(map(repr, near))}?"
        if near
        else "prepare it: dist-cts prepare (a dataset: --import its module);"
    )
    text = f"no prepared task {name!r} in {root}; {hint} prepared: {_listed(prepared)}"
    return text + (f"; datasets: {_listed(list(DATASETS))}" if DATASETS else "")


def _listed(names: list[str], most: int = 20) -> str:
    more = f", ... ({len(names)} in all)" if len(names) > most else ""
    return ", ".join(names[:most]) + more or "none"


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
