"""SamplePlan: the sample, crop and flip of every batch slot at every step, as a pure function of the seed.

The samples of a task form one endless stream, epoch after epoch: slot b of step s is position p = s * batch_size + b of
the stream, in epoch p // count. An epoch's permutation, crops and flips are drawn from generators keyed by (seed, task,
purpose, epoch). Any step can therefore be computed independently, in any process: resuming and replaying need no
saved random state.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dist_cts.seeds import hashed_seed


class PlanChunk(NamedTuple):
    """Consecutive steps of a plan; every array is [steps, batch_size]."""

    index: np.ndarray  # int64, below count
    top: np.ndarray  # int16, 0 .. 2 * padding: top of the crop in the padded image
    left: np.ndarray  # int16
    flip: np.ndarray  # bool: flip the crop horizontally


def default_padding(pixels: int) -> int:
    """Pixels of zero padding on each side before the random crop, for images of `pixels` x `pixels`."""
    return 4 if pixels <= 32 else 8


@dataclass(frozen=True)
class SamplePlan:
    """The stream of batches over the `count` samples of a task; a batch may span two or more epochs.

    Raises:
        ValueError: count or batch_size is not positive.
    """

    seed: int
    task: str
    count: int
    batch_size: int
    padding: int
    flip: bool = True

    def __post_init__(self) -> None:
        if self.count < 1 or self.batch_size < 1:
            raise ValueError(
                f"task {self.task}: {self.count} samples and batch_size={self.batch_size}; both must be positive"
            )

    def chunk(self, start: int, steps: int) -> PlanChunk:
        """Steps start .. start + steps - 1."""
        first, last = start * self.batch_size, (start + steps) * self.batch_size
        pieces = []
        for epoch in range(first // self.count, -(-last // self.count)):
            offset = epoch * self.count
            here = slice(max(first - offset, 0), min(last - offset, self.count))
            pieces.append([array[here] for array in self._epoch(epoch)])
        index, *rest = (np.concatenate(arrays).reshape(steps, -1) for arrays in zip(*pieces, strict=True))
        return PlanChunk(index.astype(np.int64), *rest)

    @functools.cached_property
    def _epoch(self) -> Callable[[int], PlanChunk]:
        return functools.lru_cache(maxsize=1)(self._draw_epoch)  # consecutive chunks share an epoch

    def _draw_epoch(self, epoch: int) -> PlanChunk:
        """The arrays of one epoch, each [count]."""

        def generator(purpose: str) -> np.random.Generator:
            key = hashed_seed(self.seed, self.task, purpose, epoch)
            return np.random.Generator(np.random.Philox(key=key))

        order = generator("order").permutation(np.arange(self.count, dtype=np.int32))
        top, left = generator("crop").integers(2 * self.padding + 1, size=(2, self.count), dtype=np.int16)
        flip = generator("flip").integers(2, size=self.count, dtype=bool) if self.flip else np.zeros(self.count, bool)
        return PlanChunk(order, top, left, flip)
