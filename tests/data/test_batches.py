import itertools
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

from dist_cts.data import batches, beton
from dist_cts.data.augment import normalise
from dist_cts.data.batches import DataConfig, TaskBatches, open_task
from dist_cts.data.source import ResidentSource, StreamingSource

CPU = torch.device("cpu")
CONFIG = DataConfig()
AUGMENTED = DataConfig(
    augment={"resized_crop": 0.2, "brightness": 0.4, "hue": 0.1, "erasing": 0.5, "mixup": 0.2, "cutmix": 1.0}
)
KINDS = ["28-raw", "32-raw", "32-jpg"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("betons")
    for kind in KINDS:
        pixels, mode = kind.split("-")
        images = rng.integers(0, 256, (50, int(pixels), int(pixels), 3), dtype=np.uint8)
        for split, count in (("train", 50), ("test", 21)):
            labels = rng.integers(0, 3, count)
            beton.write(
                root / kind / split, images[:count], labels, list("abc"), pixels=int(pixels), source="noise", mode=mode
            )
    return root


@pytest.fixture(scope="module")
def sources(root):
    """(kind, cache) -> the train split; built once, since FFCV compiles for every loader."""
    return {
        (kind, cache): open_task(root / kind, "train", DataConfig(cache=cache), CPU)
        for kind in KINDS
        for cache in ("device", "stream")
    }


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    monkeypatch.setattr(batches, "CHUNK_STEPS", 7)


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(("kind", "config"), [*((kind, CONFIG) for kind in KINDS), ("28-raw", AUGMENTED)])
def test_both_sources_give_the_same_bits_over_chunks_epochs_and_seeks(sources, kind, config):
    pair = [TaskBatches(sources[kind, cache], 5, 16, config) for cache in ("device", "stream")]
    kept = []
    for start, steps in ((0, 30), (12, 5), (400, 10)):
        for one in pair:
            one.seek(start)
        for step in range(start, start + steps):
            assert [one.step for one in pair] == [step, step]
            kept.append([one.next() for one in pair])
    # Compared at the end only: no batch may share memory with a later one.
    assert all(equal(*both) for both in kept)
    assert equal(kept[12][0], kept[30][0])
    assert not equal(kept[0][0], kept[1][0])
    images, labels = kept[0][0]
    pixels = int(kind[:2])
    assert (images.shape, images.dtype) == ((16, 3, pixels, pixels), torch.float32)
    if config is AUGMENTED:
        assert (labels.shape, labels.dtype) == ((16, 3), torch.float32)
        torch.testing.assert_close(labels.sum(1), torch.ones(16))
    else:
        assert (labels.shape, labels.dtype) == ((16,), torch.int64)
    for one in pair:
        one.close()


def test_a_batch_is_the_planned_samples(sources):
    source = sources["28-raw", "device"]
    config = DataConfig(padding=0, flip=False, normalise="dataset")
    one = TaskBatches(source, 5, 16, config)
    mean, std = torch.tensor(source.manifest.mean), torch.tensor(source.manifest.std)
    for index in one.plan.chunk(0, 9).index:
        images, labels = one.next()
        assert torch.equal(images, normalise(source.images[index], mean, std))
        assert np.array_equal(labels.numpy(), source.labels[index])


@pytest.mark.parametrize(("cache", "config"), [("device", CONFIG), ("stream", CONFIG), ("device", AUGMENTED)])
def test_the_slices_of_data_ranks_make_the_whole_batch(sources, cache, config):
    source = sources["28-raw", cache]
    whole = TaskBatches(source, 5, 12, config)
    ranks = [TaskBatches(source, 5, 12, config, data_rank=rank, data_ranks=3) for rank in range(3)]
    for _ in range(10):
        parts = [rank.next() for rank in ranks]
        assert equal(whole.next(), [torch.cat(pieces) for pieces in zip(*parts, strict=True)])
    for one in (whole, *ranks):
        one.close()


def test_a_batch_that_does_not_divide(sources):
    with pytest.raises(ValueError, match="task 28-raw: batch_size=16 is not divisible by its 3 data ranks"):
        TaskBatches(sources["28-raw", "device"], 0, 16, CONFIG, data_ranks=3)


def test_pairs_that_a_data_rank_would_divide(sources):
    with pytest.raises(ValueError, match=r"28-raw: mixup .* batch_size=9 leaves 3 on each of its 3 data ranks"):
        TaskBatches(sources["28-raw", "device"], 0, 9, AUGMENTED, data_ranks=3)


@pytest.mark.parametrize("cache", ["device", "stream"])
def test_each_chunk_of_the_plan_is_computed_once(sources, cache):
    one = TaskBatches(sources["28-raw", cache], 5, 16, CONFIG)
    computed, chunk = [], one.plan.chunk
    one.plan = types.SimpleNamespace(padding=4, chunk=lambda *at: computed.append(at) or chunk(*at))
    for _ in range(30):
        one.next()
    one.seek(22)
    one.next()
    one.close()
    assert len(computed) in (5, 6)  # steps 0 to 34 in chunks of 7, and what the prefetcher reads ahead
    assert computed == [(7 * number, 7) for number in range(len(computed))]


def test_a_subset_and_a_batch_larger_than_it(sources):
    subset = np.array([4, 8, 15])
    pair = [TaskBatches(sources["28-raw", cache], 5, 10, CONFIG, indices=subset) for cache in ("device", "stream")]
    assert pair[0].plan.count == 3
    for _ in range(10):
        one, other = (batches.next() for batches in pair)
        assert equal(one, other)
        assert set(one[1].tolist()) == set(pair[0].source.labels[subset].tolist())
    pair[1].close()


def test_memory_format_and_waiting(sources):
    one = TaskBatches(sources["28-raw", "stream"], 5, 10, CONFIG, channels_last=True)
    images, _ = one.next()
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert 0 < one.wait_seconds < 60
    one.close()


@pytest.mark.parametrize("cache", ["device", "stream"])
@pytest.mark.parametrize("batch_size", [8, 21, 50])
def test_test_batches_hold_every_image_once(root, sources, cache, batch_size):
    source = sources["28-raw", cache]
    pieces = list(batches.test_batches(source, batch_size, CONFIG))
    assert [len(labels) for _, labels in pieces] == [batch_size] * (50 // batch_size) + [50 % batch_size] * (
        50 % batch_size > 0
    )
    half = torch.full((3,), 0.5)
    images = normalise(sources["28-raw", "device"].images, half, half)
    assert torch.equal(torch.cat([images for images, _ in pieces]), images)
    assert np.array_equal(torch.cat([labels for _, labels in pieces]).numpy(), source.labels)


def test_test_batches_left_early_end_their_thread(sources):
    source = sources["28-raw", "stream"]
    pieces = batches.test_batches(source, 8, CONFIG)
    list(itertools.islice(pieces, 2))
    (prefetcher,) = source._prefetchers
    assert prefetcher._iterator.is_alive()
    pieces.close()
    assert not prefetcher._iterator.is_alive()


def test_auto_keeps_on_the_device_what_fits(root):
    for gib, kind in ((50 * 28 * 28 * 3 / 2**30, ResidentSource), (49 * 28 * 28 * 3 / 2**30, StreamingSource)):
        source = open_task(root / "28-raw", "train", DataConfig(resident_limit_gib=gib), CPU)
        assert type(source) is kind
        assert source.manifest.split == "train"
        source.close()


@pytest.mark.parametrize("cache", ["device", "stream"])
def test_files_are_verified_before_use(root, tmp_path, cache):
    config, folder = DataConfig(cache=cache), tmp_path / "task"
    shutil.copytree(root / "28-raw", folder)
    content = bytearray((folder / "train.beton").read_bytes())
    (folder / "train.beton").write_bytes(content[:-100])
    with pytest.raises(ValueError, match=r"task/train\.beton: \d+ bytes, expected \d+ from its manifest"):
        open_task(folder, "train", config, CPU)
    content[-5000] ^= 1
    (folder / "train.beton").write_bytes(content)
    with pytest.raises(ValueError, match=r"task/train\.beton: its checksum"):
        open_task(folder, "train", config, CPU)
    open_task(folder, "train", config.model_copy(update={"verify": False}), CPU).close()
    (folder / "train.beton").unlink()
    with pytest.raises(FileNotFoundError, match=r"task/train\.beton"):
        open_task(folder, "train", config, CPU)


def test_no_ffcv_before_the_first_streaming_batch(root):
    """Importing it takes seconds, which a resident raw task never has to pay."""
    script = (
        "import sys, torch; from dist_cts.data.batches import *;"
        f"source = open_task({str(root / '28-raw')!r}, 'train', DataConfig(), torch.device('cpu'));"
        "TaskBatches(source, 0, 4, DataConfig()).next();"
        "assert 'ffcv' not in sys.modules and 'numba' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
