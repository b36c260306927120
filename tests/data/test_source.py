import itertools
import threading
import time

import numpy as np
import pytest
import torch

from dist_cts.data import beton, source
from dist_cts.data.source import ResidentSource, StreamingSource
from tests.helpers.betons import read_back

CPU = torch.device("cpu")
ROWS = [np.array(row) for row in ([3, 3, 0, 99], [7, 5, 1, 2], [4], [98, 97, 96, 4])]


def endless(fault_at=None):
    for number, row in enumerate(itertools.cycle(ROWS)):
        if number == fault_at:
            raise OSError("disk on fire")
        yield row


def read(source, index):
    """uint8 [b, P, P, 3]: one row."""
    prefetcher = source.prefetch(iter([index]), len(index))
    try:
        return prefetcher.take(torch.from_numpy(index)).clone()
    finally:
        prefetcher.close()


EARLIER: set[threading.Thread] = set()  # other tests' threads may take their time to end


def loader_threads():
    started_here = set(threading.enumerate()) - EARLIER
    return [thread for thread in started_here if type(thread).__name__ == "RowIterator"]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("betons")
    paths = {}
    for mode in ("raw", "jpg"):
        images = rng.integers(0, 256, (100, 4, 4, 3), dtype=np.uint8).repeat(3, axis=1).repeat(3, axis=2)
        paths[mode] = folder / mode / "train.beton"
        labels = rng.integers(0, 3, 100)
        beton.write(paths[mode].with_suffix(""), images, labels, list("abc"), pixels=12, source="noise", mode=mode)
    return paths


@pytest.fixture(scope="module")
def streams(paths):
    EARLIER.update(threading.enumerate())
    return {mode: StreamingSource(path, beton.read_manifest(path), CPU) for mode, path in paths.items()}


@pytest.fixture(scope="module")
def residents(paths):
    return {mode: ResidentSource(path, beton.read_manifest(path), CPU) for mode, path in paths.items()}


def test_raw_images_and_labels_are_those_of_the_file(paths, residents, streams):
    images, labels = read_back(paths["raw"])
    every = np.arange(100)
    for one in (residents["raw"], streams["raw"]):
        assert np.array_equal(read(one, every).numpy(), images)
        assert np.array_equal(one.labels, labels)


def test_jpg_images_are_the_same_from_both_and_near_the_originals(residents, streams):
    every = np.arange(100)
    images = read(residents["jpg"], every)
    assert torch.equal(read(streams["jpg"], every), images)
    # Blocks of one colour stay what they were, but for the losses of JPEG.
    spread = images.view(100, 4, 3, 4, 3, 3).float().std(dim=(2, 4)).mean()
    assert 0 < spread < 0.5 * images.float().std()


def test_rows_come_in_order_with_repeats_and_short_ones(residents, streams):
    prefetcher = streams["raw"].prefetch(endless(), 4)
    for row in itertools.islice(endless(), 50):
        assert torch.equal(prefetcher.take(), read(residents["raw"], row))
    prefetcher.close()


def test_two_sources_and_two_prefetchers_of_one_take_turns_on_two_threads_each(paths, residents):
    several = {mode: StreamingSource(path, beton.read_manifest(path), CPU, workers=2) for mode, path in paths.items()}
    prefetchers = [(mode, several[mode].prefetch(endless(), 4)) for mode in ("raw", "jpg", "raw")]
    for row in itertools.islice(endless(), 40):
        for mode, prefetcher in prefetchers:
            assert torch.equal(prefetcher.take(), read(residents[mode], row))
    for one in several.values():
        one.close()
    assert not loader_threads()


def test_a_thread_that_ends_in_silence_is_an_error(streams, paths):
    prefetcher = streams["raw"].prefetch(endless(), 4, step=70)
    prefetcher.take()
    prefetcher._iterator.terminate_event.set()  # it leaves without a word; FFCV itself would now wait for ever
    prefetcher._iterator.join(5)
    for _ in range(source.AHEAD):
        prefetcher.take()
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=f"task raw, step 74: the loader thread of {paths['raw']} died$") as error:
        prefetcher.take()
    assert time.monotonic() - started < 5
    assert "\n" not in str(error.value)
    prefetcher.close()


def test_a_fault_in_the_thread_is_named_after_the_batches_before_it(streams):
    prefetcher = streams["raw"].prefetch(endless(fault_at=5), 4, step=70)
    for _ in range(5):
        prefetcher.take()
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"task raw, step 75: .*train\.beton died \(OSError: disk on fire\)"):
        prefetcher.take()
    assert time.monotonic() - started < 5
    prefetcher.close()


def test_a_thread_that_hangs_is_an_error(streams, monkeypatch):
    monkeypatch.setattr(source, "STALLED", 0.2)
    awake = threading.Event()

    def rows():
        awake.wait()
        yield from ROWS

    prefetcher = streams["raw"].prefetch(rows(), 4)
    with pytest.raises(RuntimeError, match=r"task raw, step 0: .* delivered no batch for"):
        prefetcher.take()
    awake.set()
    prefetcher.close()


def test_close_ends_the_thread_at_any_moment(streams):
    for taken in (0, 1, 9):
        prefetcher = streams["raw"].prefetch(endless(), 4)
        for _ in range(taken):
            prefetcher.take()
        assert loader_threads()
        prefetcher.close()
        prefetcher.close()
        assert not loader_threads()
    prefetcher = streams["raw"].prefetch(iter(ROWS), 4)  # this thread ends on its own
    for _ in ROWS:
        prefetcher.take()
    streams["raw"].close()
    assert not loader_threads()


def test_streaming_leaves_the_threads_of_torch_alone(paths):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        one = StreamingSource(paths["raw"], beton.read_manifest(paths["raw"]), CPU)
        read(one, ROWS[0])
        seen = [torch.get_num_threads()]
        thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert seen == [2, 2]
    finally:
        torch.set_num_threads(before)
