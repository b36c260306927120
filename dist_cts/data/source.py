"""Where a task's images come from: device memory (ResidentSource) or the .beton file through FFCV (StreamingSource).

Both give the same bits. `prefetch` announces the rows of sample indices in the order in which they will be needed;
`take` returns the images of the next row. The streaming source decodes ahead in a thread, the resident one gathers.
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
from dist_cts.data.ffcv_library import import_ffcv
from dist_cts.data.manifest import Manifest
from dist_cts.errors import RankError

AHEAD = 3  # batches decoded in advance
STALLED = 300.0  # seconds without a batch after which a running loader thread counts as stuck


class Prefetcher(Protocol):
    """Returns the images of the announced rows, one row per call."""

    def take(self, index: Tensor) -> Tensor:
        """The images of the next row, uint8 [b, P, P, 3] on the device; its indices are `index`, int64 [b].

        Valid until the next call, which may reuse the memory.
        """

    def close(self) -> None:
        """Stops the loader thread, if there is one."""


class Source(Protocol):
    """The samples of one split: its manifest, its labels (int64 [N], on the host) and its images (on the device)."""

    manifest: Manifest
    labels: np.ndarray
    device: torch.device

    def prefetch(self, rows: Iterator[np.ndarray], size: int, step: int = 0) -> Prefetcher:
        """Starts loading `rows`, int64 arrays of at most `size` indices; error messages count steps from `step`."""

    def close(self) -> None:
        """Closes all prefetchers."""


class ResidentSource:
    """All images of a split as uint8 on the device, its own prefetcher; a batch is one gather."""

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
        return self  # nothing to load

    def take(self, index: Tensor) -> Tensor:
        return self.images.index_select(0, index)

    def close(self) -> None:
        pass


class StreamingSource:
    """Images decoded by FFCV in `workers` threads, ahead of the step that needs them.

    FFCV only decodes, in the given order: its own augmentations cannot be seeded.
    """

    def __init__(self, path: Path, manifest: Manifest, device: torch.device, workers: int = 1) -> None:
        self.path, self.manifest, self.device, self.workers = path, manifest, device, workers
        self.labels = _records(path, manifest)["label"].copy()
        self._identity = _identity(path)
        self._prefetchers: weakref.WeakSet[StreamingPrefetcher] = weakref.WeakSet()

    def prefetch(self, rows: Iterator[np.ndarray], size: int, step: int = 0) -> "StreamingPrefetcher":
        prefetcher = StreamingPrefetcher(self, self._while_unchanged(rows), size, step)
        self._prefetchers.add(prefetcher)
        return prefetcher

    def close(self) -> None:
        for prefetcher in list(self._prefetchers):
            prefetcher.close()

    def _while_unchanged(self, rows: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """The rows, as long as the file is the one that was verified.

        FFCV would decode a changed file to garbage, and a read past the end of a truncated one kills the process with a
        bus error.
        """
        for row in rows:
            if _identity(self.path) != self._identity:
                raise ValueError("the file changed during the run")
            yield row

    @functools.cached_property
    def loader(self) -> Any:
        """FFCV's Loader of this file; takes about a second, with the compilation at its first batch."""
        loader_class, _ = _ffcv_classes()
        from ffcv.fields.rgb_image import SimpleRGBImageDecoder
        from numba import config, threading_layer

        workers = min(self.workers, config.NUMBA_NUM_THREADS)
        if workers > 1 and threading_layer() == "workqueue":  # the only layer that is not thread-safe
            raise ValueError(
                f"data.workers={self.workers}: numba has no thread-safe threading layer here; install tbb or libgomp, "
                "or set data.workers=1"
            )
        return loader_class(
            str(self.path),
            batch_size=1,  # every prefetcher sets its own
            num_workers=workers,
            os_cache=True,  # the threads of its other cache can die silently
            pipelines={"image": [SimpleRGBImageDecoder()], "label": None},  # labels are in memory already
            seed=0,  # unused; None would draw one from NumPy's global generator
            batches_ahead=AHEAD,
        )


class StreamingPrefetcher:
    """One FFCV iterator for all rows: with no end of an epoch there is no stall between epochs.

    FFCV's batches are views of a ring of buffers; each stays valid until the next batch is requested. On a GPU the copy
    runs on its own stream and `take` waits for it: FFCV would otherwise overwrite a buffer that is still being copied.
    """

    def __init__(self, source: StreamingSource, rows: Iterator[np.ndarray], size: int, step: int) -> None:
        self._source, self._step = source, step
        self._stream = torch.cuda.Stream(source.device) if source.device.type == "cuda" else None
        _, iterator_class = _ffcv_classes()
        source.loader.batch_size = size  # the size of the buffers that this iterator allocates
        with torch.cuda.stream(self._stream):
            self._iterator = iterator_class(source.loader, rows)

    def take(self, index: Tensor | None = None) -> Tensor:
        """The images of the next row, uint8 [b, P, P, 3] on the device; `index` is ignored, the row was announced.

        Raises:
            RankError: the loader thread died or is stuck; the message names task, file and step.
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
        """Stops the thread after its current batch."""
        self._iterator.iter_ixes = iter(())
        self._iterator.terminate_event.set()
        while self._iterator.is_alive():  # it may be waiting for space in the queue
            self._drain()
            self._iterator.join(0.01)
        self._drain()

    def _next(self) -> np.ndarray:
        # FFCV's own __next__ waits forever if the thread died.
        deadline, alive = time.monotonic() + STALLED, True
        while True:
            try:
                item = self._iterator.output_queue.get(timeout=0.5 if alive else 0.0)
            except queue.Empty:
                if not alive:
                    raise self._error("died") from self._iterator.fault
                if time.monotonic() > deadline:
                    raise self._error(f"delivered no batch for {STALLED:.0f} s") from None
                alive = self._iterator.is_alive()  # if not, look once more: its last batch may have just arrived
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
    """FFCV's Loader, and its iterator extended by lazily generated rows and a record of its thread's exception."""
    import_ffcv()
    import numba
    from ffcv.loader import Loader
    from ffcv.loader.epoch_iterator import EpochIterator
    from ffcv.pipeline.compiler import Compiler

    def set_num_threads(cls: type[Compiler], count: int) -> None:
        cls.num_threads = count
        numba.set_num_threads(count)

    Compiler.set_num_threads = classmethod(set_num_threads)  # its own also sets torch's, in every iterator

    class RowIterator(EpochIterator):
        """Decodes rows of indices until they end; `fault` is the exception that ended its thread."""

        fault: Exception | None = None

        def __init__(self, loader: Loader, rows: Iterable[np.ndarray]) -> None:
            self._rows = rows
            super().__init__(loader, order=())

        def start(self) -> None:  # called at the end of the constructor
            self.iter_ixes = iter(self._rows)
            super().start()

        def run(self) -> None:
            try:
                super().run()
            except Exception as fault:
                self.fault = fault

    return Loader, RowIterator


def _identity(path: Path) -> tuple[int, ...]:
    """Values that change when the file changes; reading them takes microseconds."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _records(path: Path, manifest: Manifest) -> np.ndarray:
    """The record of every sample: [N] of beton.SAMPLE."""
    return np.fromfile(path, beton.SAMPLE, manifest.count, offset=beton.RECORDS)


def _raw_images(path: Path, manifest: Manifest, pointers: np.ndarray) -> Tensor:
    """uint8 [N, P, P, 3], read directly from the file."""
    shape = (manifest.count, manifest.pixels, manifest.pixels, 3)
    windows = np.lib.stride_tricks.sliding_window_view(np.memmap(path, np.uint8, "r"), manifest.pixels**2 * 3)
    return torch.from_numpy(windows[pointers.astype(np.int64)]).view(shape)


def _decoded_images(source: StreamingSource, size: int = 256) -> Tensor:
    """uint8 [N, P, P, 3], every image decoded once by FFCV."""
    count, pixels = source.manifest.count, source.manifest.pixels
    rows = [np.arange(start, min(start + size, count)) for start in range(0, count, size)]
    images = torch.empty(count, pixels, pixels, 3, dtype=torch.uint8)
    prefetcher = source.prefetch(iter(rows), size)
    try:
        for row in rows:
            images[row[0] : row[-1] + 1] = prefetcher.take()
    finally:
        prefetcher.close()
    return images
