"""SamplePlan: the sample and augmentation of every batch slot at every step, as a pure function of the seed.

The samples of a task form one endless stream, epoch after epoch: slot b of step s is position p = s * batch_size + b of
the stream, in epoch p // count. An epoch's permutation, crops, flips and further augmentation are drawn from generators
keyed by (seed, task, purpose, epoch). Any step can therefore be computed independently, in any process: resuming and
replaying need no saved random state.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from pydantic import Field

from dist_cts.config import Config
from dist_cts.seeds import hashed_seed


class AugmentConfig(Config):
    """Augmentation beyond the paper's padded crop and flip, with torchvision's distributions; off by default."""

    resized_crop: float | None = Field(
        None,
        gt=0,
        le=1,
        description="instead of the padded crop: a random crop of at least this share of the image's area, with sides "
        "in a ratio of 3:4 to 4:3, resized to the image's size",
    )
    brightness: float = Field(0, ge=0, description="a random factor of at most 1 +- this; then contrast, ... in turn")
    contrast: float = Field(0, ge=0, description="a random factor of at most 1 +- this")
    saturation: float = Field(0, ge=0, description="a random factor of at most 1 +- this")
    hue: float = Field(0, ge=0, le=0.5, description="a random shift of at most +- this, as a share of the color circle")
    erasing: float = Field(0, ge=0, le=1, description="probability that a random rectangle is erased")
    mixup: float = Field(0, ge=0, description="alpha of mixup's Beta(alpha, alpha); 0: off")
    cutmix: float = Field(0, ge=0, description="alpha of CutMix; with mixup too, each image takes one of both")


NO_AUGMENTATION = AugmentConfig()


class PlanChunk(NamedTuple):
    """Consecutive steps of a plan; every array is [steps, batch_size], or [steps, batch_size, n] with n = 0 if off.

    A box is top, left, height and width in pixels, int16.
    """

    index: np.ndarray  # int64, below count
    top: np.ndarray  # int16, 0 .. 2 * padding: top of the crop in the padded image
    left: np.ndarray  # int16
    flip: np.ndarray  # bool: flip the crop horizontally
    crop: np.ndarray  # the box that is resized to the whole image, instead of the padded crop
    jitter: np.ndarray  # float32: factors of brightness, contrast and saturation, shift of the hue if it is on
    erase: np.ndarray  # the box that is erased
    cut: np.ndarray  # the box that shows the partner in the batch
    share: np.ndarray  # float32: weight of the image in its mixture with the partner, outside the box
    label: np.ndarray  # int64: instead of the sample's own


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
    pixels: int = 0
    augment: AugmentConfig = NO_AUGMENTATION

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
        index, *rest = (_stack(arrays, steps) for arrays in zip(*pieces, strict=True))
        return PlanChunk(index.astype(np.int64), *rest)

    @functools.cached_property
    def _epoch(self) -> Callable[[int], PlanChunk]:
        return functools.lru_cache(maxsize=1)(self._draw_epoch)  # consecutive chunks share an epoch

    def _draw_epoch(self, epoch: int) -> PlanChunk:
        """The arrays of one epoch, each [count] or [count, n]."""

        def generator(purpose: str) -> np.random.Generator:
            key = hashed_seed(self.seed, self.task, purpose, epoch)
            return np.random.Generator(np.random.Philox(key=key))

        order = generator("order").permutation(np.arange(self.count, dtype=np.int32))
        top, left = generator("crop").integers(2 * self.padding + 1, size=(2, self.count), dtype=np.int16)
        flip = generator("flip").integers(2, size=self.count, dtype=bool) if self.flip else np.zeros(self.count, bool)
        extra = _draw_augmentation(self.augment, self.count, self.pixels, generator)
        return PlanChunk(order, top, left, flip, *extra, label=np.zeros((self.count, 0), np.int64))


def _stack(arrays: tuple[np.ndarray, ...], steps: int) -> np.ndarray:
    """[positions, ...] in pieces to [steps, batch_size, ...]."""
    joined = np.concatenate(arrays)
    return joined.reshape(steps, len(joined) // steps, *joined.shape[1:])


def _draw_augmentation(
    config: AugmentConfig, count: int, pixels: int, generator: Callable[[str], np.random.Generator]
) -> tuple[np.ndarray, ...]:
    """crop, jitter, erase, cut and share of `count` samples; what is off has no columns and is not drawn."""
    crop = erase = cut = np.zeros((count, 0), np.int16)
    jitter = share = np.zeros((count, 0), np.float32)
    if config.resized_crop is not None:
        crop = _boxes(generator("resized crop"), count, pixels, (config.resized_crop, 1), (3 / 4, 4 / 3), pixels)
    strengths = np.array([config.brightness, config.contrast, config.saturation])
    if strengths.any() or config.hue:
        rng = generator("jitter")
        jitter = rng.uniform(np.maximum(1 - strengths, 0), 1 + strengths, (count, 3))
        if config.hue:
            jitter = np.column_stack((jitter, rng.uniform(-config.hue, config.hue, count)))
    if config.erasing:
        rng = generator("erasing")
        boxes = _boxes(rng, count, pixels, (0.02, 0.33), (0.3, 3.3), pixels - 1)
        erase = np.where(rng.random((count, 1)) < config.erasing, boxes, 0).astype(np.int16)
    if config.mixup or config.cutmix:
        cut, share = _mixtures(generator("mix"), count, pixels, config.mixup, config.cutmix)
    return crop, jitter.astype(np.float32), erase, cut, share.astype(np.float32)


def _boxes(
    rng: np.random.Generator,
    count: int,
    pixels: int,
    area: tuple[float, float],
    ratio: tuple[float, float],
    largest: int,
) -> np.ndarray:
    """Boxes, int16 [count, 4], of random area (share of the image) and ratio of height to width, as torchvision draws.

    Of ten draws, the first whose sides are at most `largest` counts; if none is, the box is the whole image, or empty
    if that is too large.
    """
    areas = pixels**2 * rng.uniform(*area, (10, count))
    ratios = np.exp(rng.uniform(*np.log(ratio), (10, count)))
    sides = np.rint(np.sqrt(areas * np.stack((ratios, 1 / ratios))))  # [2, 10, count]
    fits = ((sides > 0) & (sides <= largest)).all(0)
    first = sides[:, fits.argmax(0), np.arange(count)]
    sides = np.where(fits.any(0), first, pixels if largest == pixels else 0).astype(np.int64)
    return np.concatenate((rng.integers(pixels - sides + 1), sides)).T.astype(np.int16)


def _mixtures(
    rng: np.random.Generator, count: int, pixels: int, mixup: float, cutmix: float
) -> tuple[np.ndarray, np.ndarray]:
    """cut, int16 [count, 4], and share [count, 1]: mixup has an empty box, CutMix a share of 1."""
    cuts = rng.random(count) < (0.5 if mixup and cutmix else float(cutmix > 0))
    weight = np.where(cuts, rng.beta(cutmix or 1, cutmix or 1, count), rng.beta(mixup or 1, mixup or 1, count))
    half = (0.5 * np.sqrt(1 - weight) * pixels).astype(np.int64)
    centre = rng.integers(pixels, size=(2, count))
    corner, end = np.maximum(centre - half, 0), np.minimum(centre + half, pixels)
    box = np.where(cuts, np.concatenate((corner, end - corner)), 0).T.astype(np.int16)
    return box, np.where(cuts, 1, weight)[:, None]
