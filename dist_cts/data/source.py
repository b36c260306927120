"""Where a task's images come from: memory on the device, or the .beton through FFCV.

Both sources give the same bits and work alike. `feed` is told the rows of sample indices that will be wanted, in
order, and `take` gives the images of the next row: the streaming source decodes ahead in a thread, the resident one
looks them up. `read` gives any samples, out of order.
"""

import functools
import queue
import time
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dist_cts.data import beton
from dist_cts.data.beton import Manifest
from dist_cts.data.ffcv_library import import_ffcv
from dist_cts.errors import RankError

AHEAD = 3  # batches that are decoded in advance
STALLED = 300.0  # seconds without a batch after which a living loader thread counts as stuck


class Prefetcher(Protocol):
    """The images of announced rows, one row after the other."""

    def take(self, index: Tensor) -> Tensor:
        """uint8 [b, P, P, 3] of the next row, whose indices are `index` (int64 [b], on the device).

        Valid until the next `take`, which may reuse its memory.
        """

    def close(self) -> None:
        """Ends its thread, if it has one."""


class Source(Protocol):
    """The samples of one split: its manifest, its labels (int64 [N], on the host) and its images, on the device."""

    manifest: Manifest
    labels: np.ndarray
    device: torch.device

    def prefetch(self, rows: Iterator[np.ndarray], size: int, step: int = 0) -> Prefetcher:
        """Starts on `rows`, int64 arrays of at most `size` indices; errors call the first row step `step`."""

    def read(self, index: np.ndarray) -> Tensor:
        """uint8 [b, P, P, 3] of samples `index`, int64 [b]."""

    def close(self) -> None:
        """Closes all feeds."""


class ResidentSource:
    """All images of a split as uint8 on the device; a batch is one gather."""

    def __init__(self, path: Path, manifest: Manifest, device: torch.device, workers: int = 1) -> None:
        self.manifest, self.device = manifest, device
        records = _records(path, manifest)
        self.labels = records["label"].copy()
        if manifest.mode == "raw":
            images = _raw_images(path, manifest, records["image"]["pointer"])
        else:
            images = _decoded_images(StreamingSource(path, manifest, torch.device("cpu"), workers))
        self.images = images.to(device)  # [N, P, P, 3]

    def prefetch(self, rows: Iterator[np.ndarray], size: int, step: int = 0) -> "ResidentSource":
        return self  # nothing to prepare

    def take(self, index: Tensor) -> Tensor:
        return self.images.index_select(0, index)

    def read(self, index: np.ndarray) -> Tensor:
        return self.take(torch.from_numpy(index).to(self.device))

    def close(self) -> None:
        pass


class StreamingSource:
    """Images decoded by FFCV on `workers` threads, ahead of the step that needs them.

    FFCV only decodes, in the order that it is given: its own augmentations cannot be seeded.
    """

    def __init__(self, path: Path, manifest: Manifest, device: torch.device, workers: int = 1) -> None:
        self.path, self.manifest, self.device, self.workers = path, manifest, device, workers
        self.labels = _records(path, manifest)["label"].copy()
        self._identity = _identity(path)
        self._prefetchers: weakref.WeakSet[StreamingPrefetcher] = weakref.WeakSet()

    def prefetch(self, rows: Iterator[np.ndarray], size: int, step: int = 0) -> "StreamingPrefetcher":
        prefetch = StreamingPrefetcher(self, self._unchanged(rows), size, step)
        self._prefetchers.add(prefetch)
        return prefetch

    def read(self, index: np.ndarray) -> Tensor:
        prefetch = self.prefetch(iter([index]), len(index))
        try:
            return prefetch.take()
        finally:
            prefetch.close()

    def close(self) -> None:
        for prefetch in list(self._prefetchers):
            prefetch.close()

    def _unchanged(self, rows: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """The rows, while the file is the one that was verified: FFCV would decode any other as it comes, and reading
        behind a new end is a bus error.
        """
        for row in rows:
            if _identity(self.path) != self._identity:
                raise ValueError("the file was changed during the run")
            yield row

    @functools.cached_property
    def loader(self) -> Any:
        """FFCV's Loader of this file; about a second, with what the first batch compiles."""
        loader_class, _ = _ffcv_classes()
        from ffcv.fields.rgb_image import SimpleRGBImageDecoder
        from numba import config, threading_layer

        workers = min(self.workers, config.NUMBA_NUM_THREADS)
        if workers > 1 and threading_layer() == "workqueue":  # the one layer that two threads cannot share
            raise ValueError("data.workers > 1 needs a thread-safe layer of numba: install tbb or libgomp")
        return loader_class(
            str(self.path),
            batch_size=1,  # every feed sets its own
            num_workers=workers,
            os_cache=True,  # its other cache has threads that can die in silence
            pipelines={"image": [SimpleRGBImageDecoder()], "label": None},  # labels need no loader
            seed=0,  # unused, but None would draw one from numpy's global generator
            batches_ahead=AHEAD,
        )


class StreamingPrefetcher:
    """One FFCV iterator for as many rows as there are: there is no end of an epoch, hence no stall at it.

    FFCV's batches are views of a ring of buffers, each left alone until the next batch is asked for. On a GPU the copy
    has a stream of its own, which is waited for: FFCV itself would overwrite a buffer that is still being copied.
    """

    def __init__(self, source: StreamingSource, rows: Iterator[np.ndarray], size: int, step: int) -> None:
        self._source, self._step = source, step
        self._stream = torch.cuda.Stream(source.device) if source.device.type == "cuda" else None
        _, iterator_class = _ffcv_classes()
        source.loader.batch_size = size  # of the ring that this iterator allocates
        with torch.cuda.stream(self._stream):
            self._iterator = iterator_class(source.loader, rows)

    def take(self, index: Tensor | None = None) -> Tensor:
        """uint8 [b, P, P, 3] of the next row; `index` is not looked at, the row was announced.

        Raises:
            RankError: the loader thread has died or is stuck; the message names task, file and step.
        """
        batch = torch.from_numpy(self._next())
        self._step += 1
        if self._stream is None:
            return batch
        with torch.cuda.stream(self._stream):
            images = batch.to(self._source.device, non_blocking=True)
        self._stream.synchronize()
        images.record_stream(torch.cuda.current_stream(self._source.device))
        return images

    def close(self) -> None:
        """Ends the thread, after the batch that it is at."""
        self._iterator.iter_ixes = iter(())
        self._iterator.terminate_event.set()
        while self._iterator.is_alive():  # it may be waiting for a place in the queue
            self._drain()
            self._iterator.join(0.01)
        self._drain()

    def _next(self) -> np.ndarray:
        # FFCV's own __next__ waits for ever if the thread has died.
        deadline, alive = time.monotonic() + STALLED, True
        while True:
            try:
                item = self._iterator.output_queue.get(timeout=0.5 if alive else 0.0)
            except queue.Empty:
                if not alive:
                    raise self._error("died") from self._iterator.fault
                if time.monotonic() > deadline:
                    raise self._error(f"gave nothing for {STALLED:.0f} s") from None
                alive = self._iterator.is_alive()  # if not, look once more: it may have put a batch before it died
                continue
            assert item is not None, "more batches taken than rows announced"
            _, (images,) = item
            return images

    def _error(self, what: str) -> RankError:
        fault = self._iterator.fault
        cause = f" ({type(fault).__name__}: {' '.join(str(fault).split())})" if fault else ""
        task, path = self._source.manifest.name, self._source.path
        return RankError(f"task {task}, step {self._step}: the loader thread of {path} {what}{cause}")

    def _drain(self) -> None:
        while not self._iterator.output_queue.empty():
            self._iterator.output_queue.get_nowait()


@functools.cache
def _ffcv_classes() -> tuple[type, type]:
    """FFCV's Loader, and its iterator with rows that come lazily and a fault that is kept."""
    import_ffcv()
    import numba
    from ffcv.loader import Loader
    from ffcv.loader.epoch_iterator import EpochIterator
    from ffcv.pipeline.compiler import Compiler

    def set_num_threads(cls: type[Compiler], count: int) -> None:
        cls.num_threads = count
        numba.set_num_threads(count)

    Compiler.set_num_threads = classmethod(set_num_threads)  # its own sets torch's threads too, in every iterator

    class RowIterator(EpochIterator):
        """Decodes rows of indices while there are any; `fault` is what its thread died of."""

        fault: Exception | None = None

        def __init__(self, loader: Loader, rows: Iterable[np.ndarray]) -> None:
            self._rows = rows
            super().__init__(loader, order=())

        def start(self) -> None:  # the last thing that the constructor does
            self.iter_ixes = iter(self._rows)
            super().start()

        def run(self) -> None:
            try:
                super().run()
            except Exception as fault:
                self.fault = fault

    return Loader, RowIterator


def _identity(path: Path) -> tuple[int, ...]:
    """What changes with a file; microseconds."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _records(path: Path, manifest: Manifest) -> np.ndarray:
    """What FFCV's format says of every sample: [N] of beton.SAMPLE."""
    return np.fromfile(path, beton.SAMPLE, manifest.count, offset=beton.RECORDS)


def _raw_images(path: Path, manifest: Manifest, pointers: np.ndarray) -> Tensor:
    """uint8 [N, P, P, 3], straight from the file."""
    shape = (manifest.count, manifest.pixels, manifest.pixels, 3)
    windows = np.lib.stride_tricks.sliding_window_view(np.memmap(path, np.uint8, "r"), manifest.pixels**2 * 3)
    return torch.from_numpy(windows[pointers.astype(np.int64)]).view(shape)


def _decoded_images(source: StreamingSource, size: int = 256) -> Tensor:
    """uint8 [N, P, P, 3], each image once through FFCV."""
    count, pixels = source.manifest.count, source.manifest.pixels
    rows = [np.arange(start, min(start + size, count)) for start in range(0, count, size)]
    images = torch.empty(count, pixels, pixels, 3, dtype=torch.uint8)
    prefetch = source.prefetch(iter(rows), size)
    try:
        for row in rows:
            images[row[0] : row[-1] + 1] = prefetch.take()
    finally:
        prefetch.close()
    return images
