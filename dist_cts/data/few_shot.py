"""Few-shot tasks: N classes and K images of each, drawn for each episode from one prepared task."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from dist_cts.config import Config
from dist_cts.data.plan import PlanChunk, SamplePlan
from dist_cts.seeds import hashed_seed


class FewShotConfig(Config):
    """N-way K-shot tasks; off by default."""

    ways: int = Field(0, ge=0, description="N, classes of a few-shot task; 0: tasks with all their classes")
    shots: int = Field(1, gt=0, description="K, training images per class")

    @model_validator(mode="after")
    def _several_classes(self) -> "FewShotConfig":
        if self.ways == 1:
            raise ValueError("few_shot.ways=1: a task needs 2 classes or more")
        return self


def draw_task(
    labels: np.ndarray, few_shot: FewShotConfig, seed: int, name: str, m: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """The few-shot task of episode m: its classes [N], and images, indices into labels [N * shots], class by class.

    Raises:
        ValueError: fewer than N classes have that many images.
    """
    rng = np.random.default_rng(hashed_seed(seed, name, "few-shot", m))
    classes, counts = np.unique(labels, return_counts=True)
    large = classes[counts >= few_shot.shots]
    if len(large) < few_shot.ways:
        raise ValueError(
            f"task {name}: few_shot needs {few_shot.ways} classes of {few_shot.shots} images, "
            f"only {len(large)} of its {len(classes)} have that many"
        )
    chosen = rng.choice(large, few_shot.ways, replace=False)
    images = [rng.choice(np.flatnonzero(labels == label), few_shot.shots, replace=False) for label in chosen]
    return chosen, np.concatenate(images).astype(np.int64)


def draw_queries(labels: np.ndarray, classes: np.ndarray, queries: int, seed: int) -> np.ndarray:
    """Up to `queries` images of each class, indices into labels."""
    rng = np.random.default_rng(hashed_seed(seed, "queries"))
    images = [rng.permutation(np.flatnonzero(labels == label))[:queries] for label in classes]
    return np.concatenate(images).astype(np.int64)


@dataclass(frozen=True)
class FewShotSplit:
    """The images `indices` of a split, of the chosen `classes`, whose labels become 0 .. N - 1 in their order."""

    split: Any
    chosen: np.ndarray
    indices: np.ndarray

    @property
    def classes(self) -> int:
        return len(self.chosen)

    @property
    def labels(self) -> np.ndarray:
        return np.argsort(self.chosen)[np.searchsorted(np.sort(self.chosen), self.split.labels[self.indices])]

    def test_batches(self, batch_size: int, indices: np.ndarray | None = None) -> Iterator[tuple[Any, Tensor]]:
        """Every image, or every one of `indices` [of this split], once and in order."""
        indices = np.arange(len(self.indices)) if indices is None else indices
        labels = torch.from_numpy(self.labels[indices]).split(batch_size)
        batches = self.split.test_batches(batch_size, self.indices[indices])
        for (inputs, targets), label in zip(batches, labels, strict=True):
            yield inputs, label.to(targets.device)


@dataclass(frozen=True)
class FewShotPlan:
    """A plan whose samples change with every episode of K steps; `label` is the class among the N of the episode.

    `samples` gives seed, name and augmentation, and the order of an episode's N * shots samples.
    """

    samples: SamplePlan
    labels: np.ndarray
    few_shot: FewShotConfig
    K: int

    @property
    def padding(self) -> int:
        return self.samples.padding

    def chunk(self, start: int, steps: int) -> PlanChunk:
        """Steps start .. start + steps - 1."""
        pieces, end = [], start + steps
        while start < end:
            m, k = divmod(start, self.K)
            pieces.append(self._episode(m, k, min(self.K - k, end - start)))
            start += len(pieces[-1].index)
        return PlanChunk(*(np.concatenate(arrays) for arrays in zip(*pieces, strict=True)))

    def task_at(self, m: int) -> tuple[np.ndarray, np.ndarray]:
        """Classes and images of episode m; see `draw_task`."""
        return draw_task(self.labels, self.few_shot, self.samples.seed, self.samples.task, m)

    def _episode(self, m: int, k: int, steps: int) -> PlanChunk:
        samples = self.samples
        _, images = self.task_at(m)
        chunk = replace(samples, seed=hashed_seed(samples.seed, samples.task, "episode", m)).chunk(k, steps)
        return chunk._replace(index=images[chunk.index], label=chunk.index[..., None] // self.few_shot.shots)
