"""Batches of a task, ready for the model: the samples of its plan, read from a source and augmented on the device."""

import functools
import itertools
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dist_cts.config import Config
from dist_cts.data import augment, beton
from dist_cts.data.few_shot import FewShotConfig, FewShotPlan
from dist_cts.data.manifest import Manifest
from dist_cts.data.plan import AugmentConfig, PlanChunk, SamplePlan, default_padding
from dist_cts.data.source import Prefetcher, ResidentSource, Source, StreamingSource

FOREVER = 1 << 62
CHUNK_STEPS = 256  # steps whose plan is computed and copied to the device at once


class DataConfig(Config):
    """Where the prepared tasks are, and how their images are cached, verified and augmented."""

    root: Path = Field(Path("data"), description="folder of the prepared tasks, one subfolder per task")
    cache: Literal["auto", "device", "stream"] = Field(
        "auto",
        description="device: all images in device memory; stream: loaded by FFCV during training; "
        "auto: device for splits of at most resident_limit_gib, else stream",
    )
    resident_limit_gib: float = Field(2.0, ge=0, description="GiB; with cache=auto, larger splits are streamed")
    workers: int = Field(1, gt=0, description="FFCV threads per streamed task; one is usually enough for raw images")
    dataset_workers: int = Field(
        0, ge=0, description="DataLoader processes per task that is a PyTorch dataset; 0: the training process loads"
    )
    verify: bool = Field(True, description="verify the checksum of every .beton file before use")
    normalise: Literal["half", "dataset"] = Field(
        "half", description="half: mean and std 0.5; dataset: mean and std of the train split"
    )
    padding: int | None = Field(
        None,
        ge=0,
        le=1000,
        description="pixels of zero padding before the random crop; default: 4 up to 32 px, 8 above",
    )
    flip: bool = Field(True, description="flip each image horizontally with probability 0.5")
    augment: AugmentConfig = AugmentConfig()


def open_task(folder: str | Path, split: str, config: DataConfig, device: torch.device) -> Source:
    """Opens FOLDER/SPLIT.beton after verifying it against its manifest.

    Raises:
        FileNotFoundError: the file or its manifest is missing.
        ValueError: one of them is damaged, or they do not match.
        ImportError: ffcv is needed, for streaming or JPEG, and cannot be imported.
    """
    path = Path(folder) / f"{split}.beton"
    manifest = beton.verify(path, checksum=config.verify)
    fits = manifest.count * manifest.pixels**2 * 3 <= config.resident_limit_gib * 2**30
    resident = config.cache == "device" or (config.cache == "auto" and fits)
    kind = ResidentSource if resident else StreamingSource
    return kind(path, manifest, torch.device(device), config.workers)


class TaskBatches:
    """The endless stream of one task's training batches; `step`, the number of the next one, is the only state.

    With D data ranks, rank r returns samples r * B / D to (r + 1) * B / D - 1 of every batch.

    Args:
        indices: int64, the samples to use; None for all.
        few_shot: draws other samples for every episode of `inner_steps` steps, labeled 0 .. ways - 1.
        chunk_steps: steps that are planned at once; None: CHUNK_STEPS.

    Raises:
        ValueError: the batch size is not divisible by the number of data ranks.
    """

    def __init__(
        self,
        source: Source,
        seed: int,
        batch_size: int,
        config: DataConfig,
        *,
        data_rank: int = 0,
        data_ranks: int = 1,
        channels_last: bool = False,
        indices: np.ndarray | None = None,
        few_shot: FewShotConfig | None = None,
        inner_steps: int = FOREVER,
        chunk_steps: int | None = None,
    ) -> None:
        manifest = source.manifest
        if batch_size % data_ranks:
            raise ValueError(
                f"task {manifest.name}: batch_size={batch_size} is not divisible by its {data_ranks} data ranks"
            )
        self.source, self.step, self.wait_seconds = source, 0, 0.0
        self.fingerprint = manifest.sha256
        count = manifest.count if indices is None else len(indices)
        padding = default_padding(manifest.pixels) if config.padding is None else config.padding
        self.plan = SamplePlan(
            seed, manifest.name, count, batch_size, padding, config.flip, manifest.pixels, config.augment
        )
        self.classes = manifest.classes
        if few_shot is not None:
            samples = replace(self.plan, count=few_shot.ways * few_shot.shots)
            self.plan, self.classes = FewShotPlan(samples, source.labels, few_shot, inner_steps), few_shot.ways
        self._indices, self._chunk_steps = indices, chunk_steps or CHUNK_STEPS
        self._size = batch_size // data_ranks
        self._mixes = config.augment.mixup > 0 or config.augment.cutmix > 0
        if self._mixes and self._size % 2:
            raise ValueError(
                f"task {manifest.name}: mixup and cutmix mix the images of a batch in pairs; batch_size={batch_size} "
                f"leaves {self._size} on each of its {data_ranks} data ranks: choose an even number"
            )
        self._slice = slice(data_rank * self._size, (data_rank + 1) * self._size)
        self._mean, self._std = _mean_and_std(manifest, config, source.device)
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._prefetcher: Prefetcher | None = None
        self._remaining: Iterator[tuple[PlanChunk, Tensor]] = iter(())
        self._chunk, self._lock = functools.lru_cache(maxsize=2)(self._expand), threading.Lock()

    def next(self) -> tuple[Tensor, Tensor]:
        """Images, float32 [B / D, 3, P, P], and labels of step `step`; then advances `step`.

        Labels are int64 [B / D]; with mixup or CutMix, class probabilities, float32 [B / D, classes].

        Raises:
            RankError: the source failed; the message names task, file and step.
        """
        started = time.perf_counter()
        if self._prefetcher is None:
            index_rows = itertools.chain.from_iterable(chunk.index for chunk in self._chunks(self.step))
            self._prefetcher = self.source.prefetch(index_rows, self._size, self.step)
            self._remaining = self._rows(self._chunks(self.step))
        plan, labels = next(self._remaining)
        images = self._prefetcher.take(plan.index)
        self.wait_seconds += time.perf_counter() - started
        self.step += 1
        return self._augment(images, labels, plan)

    def seek(self, step: int) -> None:
        """Sets the step of the next batch; any batch can be replayed."""
        self.close()
        self.step = step

    def close(self) -> None:
        """Stops the loader thread, if there is one; `next` restarts it."""
        if self._prefetcher is not None:
            self._prefetcher.close()
        self._prefetcher, self._remaining = None, iter(())

    def _augment(self, images: Tensor, labels: Tensor, plan: PlanChunk) -> tuple[Tensor, Tensor]:
        images = augment.augment(
            images, plan, padding=self.plan.padding, mean=self._mean, std=self._std, memory_format=self._memory_format
        )
        if self._mixes:
            return augment.mix(images, labels, plan.cut, plan.share, self.classes)
        return images, labels

    def _chunks(self, start: int) -> Iterator[PlanChunk]:
        """The plan from step `start` on, without end: this data rank's part, [steps, B / D], in the source's indices.

        The prefetcher's thread and `next` both read it; each chunk is computed once.
        """
        while True:
            number, offset = divmod(start, self._chunk_steps)
            with self._lock:
                chunk = self._chunk(number)
            yield PlanChunk(*(array[offset:] for array in chunk))
            start += self._chunk_steps - offset

    def _expand(self, number: int) -> PlanChunk:
        chunk = self.plan.chunk(number * self._chunk_steps, self._chunk_steps)
        chunk = PlanChunk(*(array[:, self._slice] for array in chunk))
        return chunk if self._indices is None else chunk._replace(index=self._indices[chunk.index])

    def _rows(self, chunks: Iterator[PlanChunk]) -> Iterator[tuple[PlanChunk, Tensor]]:
        """Plan [B / D] and labels [B / D] of each step, as tensors on the device; one copy per chunk."""
        for chunk in chunks:
            labels = chunk.label[..., 0] if chunk.label.shape[-1] else self.source.labels[chunk.index]
            arrays = (*chunk, labels)
            tensors = (_move(np.ascontiguousarray(array), self.source.device) for array in arrays)
            for *plan, labels in zip(*tensors, strict=True):
                yield PlanChunk(*plan), labels


def test_batches(
    source: Source,
    batch_size: int,
    config: DataConfig,
    indices: np.ndarray | None = None,  # noqa: PT028
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every image once, in order: float32 [b, 3, P, P] and labels, int64 [b]; the last batch may be smaller.

    indices: int64, only these images; None: all.
    """
    mean, std = _mean_and_std(source.manifest, config, source.device)
    indices = np.arange(source.manifest.count) if indices is None else indices
    rows = np.split(indices, range(batch_size, len(indices), batch_size))
    prefetcher = source.prefetch(iter(rows), batch_size)
    try:
        for index in rows:
            images = prefetcher.take(_move(index, source.device))
            labels = _move(source.labels[index], source.device)
            yield augment.normalise(images, mean, std), labels
    finally:
        prefetcher.close()


def _mean_and_std(manifest: Manifest, config: DataConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Per channel, [3] each, in 0 .. 1; `half` follows the paper's released code."""
    mean, std = ([0.5] * 3, [0.5] * 3) if config.normalise == "half" else (manifest.mean, manifest.std)
    return torch.tensor(mean, device=device), torch.tensor(std, device=device)


def _move(array: np.ndarray, device: torch.device) -> Tensor:
    """To the device; from pinned memory the copy is queued and the host does not wait for it."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
