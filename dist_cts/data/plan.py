"""SamplePlan: which sample, crop and flip a task sees at every step, so that nothing random happens in training.

The samples of a task form one endless stream, epoch after epoch: slot b of step s is position p = s * batch_size + b of
the stream, in epoch p // count. An epoch's permutation, crops and flips are drawn from generators keyed by (seed, task,
purpose, epoch). So any step can be computed alone, in any process: nothing has to be saved to resume or to replay.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dist_cts.seeds import hashed_seed


class PlanChunk(NamedTuple):
    """Some consecutive steps of a plan; every array is [steps, batch_size]."""

    index: np.ndarray  # int64, below count
    top: np.ndarray  # int16, 0 .. 2 * padding: the crop's corner in the padded image
    left: np.ndarray  # int16
    flip: np.ndarray  # bool, of the crop


def default_padding(pixels: int) -> int:
    """Zeros on each side before the random crop, for images of `pixels` x `pixels`."""
    return 4 if pixels <= 32 else 8


@dataclass(frozen=True)
class SamplePlan:
    """The stream of `count` samples that a task sees in batches; a batch may span epochs, even several.

    Raises:
        ValueError: no samples, or an empty batch.
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
                f"task {self.task}: {self.count} samples in batches of {self.batch_size}; both must be > 0"
            )

    def chunk(self, start: int, steps: int) -> PlanChunk:
        """Steps start .. start + steps - 1, in whatever epochs they lie."""
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
        return functools.lru_cache(maxsize=4)(self._draw_epoch)  # neighbouring stretches share an epoch

    def _draw_epoch(self, epoch: int) -> PlanChunk:
        """An epoch's arrays [count]."""

        def generator(purpose: str) -> np.random.Generator:
            key = hashed_seed(self.seed, self.task, purpose, epoch)
            return np.random.Generator(np.random.Philox(key=key))

        order = generator("order").permutation(np.arange(self.count, dtype=np.int32))
        top, left = generator("crop").integers(2 * self.padding + 1, size=(2, self.count), dtype=np.int16)
        flip = generator("flip").integers(2, size=self.count, dtype=bool) if self.flip else np.zeros(self.count, bool)
        return PlanChunk(order, top, left, flip)
