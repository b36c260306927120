"""Batches of a task, ready for the model: the plan's samples from a source, augmented on the device."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dist_cts.config import Config
from dist_cts.data import augment, beton
from dist_cts.data.beton import Manifest
from dist_cts.data.plan import PlanChunk, SamplePlan, default_padding
from dist_cts.data.source import Prefetcher, ResidentSource, Source, StreamingSource

CHUNK_STEPS = 256  # steps whose plan is computed and moved to the device together


class DataConfig(Config):
    """Where the tasks are and how their images are held and augmented."""

    root: Path = Field(Path("data"), description="folder of the prepared tasks, a folder for each")
    cache: Literal["auto", "device", "stream"] = Field(
        "auto", description="images in device memory, or streamed by FFCV; auto: by resident_limit_gib"
    )
    resident_limit_gib: float = Field(2.0, ge=0, description="with cache=auto, larger splits are streamed")
    workers: int = Field(1, gt=0, description="FFCV threads a streamed task; raw images rarely need a second")
    verify: bool = Field(True, description="compare every .beton with its checksum before use")
    normalise: Literal["half", "dataset"] = Field(
        "half", description="half: mean and std 0.5; dataset: those of the train split"
    )
    padding: int | None = Field(
        None, ge=0, le=1000, description="zeros around an image before its random crop; default 4, above 32 px 8"
    )
    flip: bool = Field(True, description="flip half of the images left to right")


def open_task(folder: str | Path, split: str, config: DataConfig, device: torch.device) -> Source:
    """The samples of FOLDER/SPLIT.beton, compared with their manifest first.

    Raises:
        FileNotFoundError, ValueError: the file or its manifest is missing, torn, or does not fit the other.
    """
    path = Path(folder) / f"{split}.beton"
    manifest = beton.verify(path, checksum=config.verify)
    fits = manifest.count * manifest.pixels**2 * 3 <= config.resident_limit_gib * 2**30
    resident = config.cache == "device" or (config.cache == "auto" and fits)
    kind = ResidentSource if resident else StreamingSource
    return kind(path, manifest, torch.device(device), config.workers)


class TaskBatches:
    """The endless batches of one task; `step` is the next one's number and all the state that there is.

    With D data ranks each gives its slice of every batch: rank r the samples r * B / D to (r + 1) * B / D - 1.

    Args:
        indices: int64, the samples to use; None for all.

    Raises:
        ValueError: the batch does not divide by the data ranks.
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
    ) -> None:
        manifest = source.manifest
        if batch_size % data_ranks:
            raise ValueError(
                f"task {manifest.name}: a batch of {batch_size} does not divide by {data_ranks} data ranks"
            )
        self.source, self.step, self.wait_seconds = source, 0, 0.0
        count = manifest.count if indices is None else len(indices)
        padding = default_padding(manifest.pixels) if config.padding is None else config.padding
        self.plan = SamplePlan(seed, manifest.name, count, batch_size, padding, config.flip)
        self._indices = indices
        self._size = batch_size // data_ranks
        self._mine = slice(data_rank * self._size, (data_rank + 1) * self._size)
        self._mean, self._std = _mean_and_std(manifest, config, source.device)
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._prefetcher: Prefetcher | None = None
        self._rows: Iterator[tuple[Tensor, ...]] = iter(())

    def next(self) -> tuple[Tensor, Tensor]:
        """Images, float32 [B / D, 3, P, P], and labels, int64 [B / D], of step `step`, which it advances.

        Raises:
            RankError: the source broke; the message names task, file and step.
        """
        started = time.perf_counter()
        if self._prefetcher is None:
            self._prefetcher = self.source.prefetch(self._index_rows(self.step), self._size, self.step)
            self._rows = self._device_rows(self.step)
        row = next(self._rows)
        images = self._prefetcher.take(row[0])
        self.wait_seconds += time.perf_counter() - started
        self.step += 1
        return self._augment(images, *row)

    def batch_at(self, step: int) -> tuple[Tensor, Tensor]:
        """What `next` gives or gave at any step, to the bit; neither changes what the other gives."""
        chunk = self._chunk(step, 1)
        return self._augment(self.source.read(chunk.index[0]), *next(self._to_device(chunk)))

    def seek(self, step: int) -> None:
        """Makes `step` the next one."""
        self.close()
        self.step = step

    def close(self) -> None:
        """Ends the loader thread, if there is one; `next` would start it again."""
        if self._prefetcher is not None:
            self._prefetcher.close()
        self._prefetcher, self._rows = None, iter(())

    def _augment(
        self, images: Tensor, index: Tensor, top: Tensor, left: Tensor, flip: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        images = augment.augment(
            images,
            top,
            left,
            flip,
            padding=self.plan.padding,
            mean=self._mean,
            std=self._std,
            memory_format=self._memory_format,
        )
        return images, labels

    def _chunk(self, start: int, steps: int) -> PlanChunk:
        """This data rank's part of the plan, in the source's indices; [steps, B / D]."""
        chunk = PlanChunk(*(array[:, self._mine] for array in self.plan.chunk(start, steps)))
        return chunk if self._indices is None else chunk._replace(index=self._indices[chunk.index])

    def _index_rows(self, start: int) -> Iterator[np.ndarray]:
        """int64 [B / D] for every step from `start` on; the loader's thread reads this."""
        while True:
            yield from self._chunk(start, CHUNK_STEPS).index
            start += CHUNK_STEPS

    def _device_rows(self, start: int) -> Iterator[tuple[Tensor, ...]]:
        while True:
            yield from self._to_device(self._chunk(start, CHUNK_STEPS))
            start += CHUNK_STEPS

    def _to_device(self, chunk: PlanChunk) -> Iterator[tuple[Tensor, ...]]:
        """index, top, left, flip and labels [B / D] of each step, moved together."""
        arrays = (*chunk, self.source.labels[chunk.index])
        tensors = [_move(torch.from_numpy(np.ascontiguousarray(array)), self.source.device) for array in arrays]
        return zip(*tensors, strict=True)


def test_batches(source: Source, batch_size: int, config: DataConfig) -> Iterator[tuple[Tensor, Tensor]]:
    """Every image once, in order, as float32 [b, 3, P, P] with labels int64 [b]; the last batch may be smaller."""
    mean, std = _mean_and_std(source.manifest, config, source.device)
    indices = np.split(np.arange(source.manifest.count), range(batch_size, source.manifest.count, batch_size))
    prefetch = source.prefetch(iter(indices), batch_size)
    try:
        for index in indices:
            images = prefetch.take(_move(torch.from_numpy(index), source.device))
            labels = _move(torch.from_numpy(source.labels[index]), source.device)
            yield augment.normalise(images, mean, std), labels
    finally:
        prefetch.close()


def _mean_and_std(manifest: Manifest, config: DataConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """[3] each, in 0 .. 1; `half` is what the paper's code did."""
    mean, std = ([0.5] * 3, [0.5] * 3) if config.normalise == "half" else (manifest.mean, manifest.std)
    return torch.tensor(mean, device=device), torch.tensor(std, device=device)


def _move(tensor: Tensor, device: torch.device) -> Tensor:
    """To the device, behind what it is doing: from pinned memory the host need not wait."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
