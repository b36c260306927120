import hashlib
import subprocess
import sys

import numpy as np
import pytest

from dist_cts.data.plan import AugmentConfig, SamplePlan, default_padding

PLAN = SamplePlan(seed=3, task="noise", count=100, batch_size=16, padding=4)
DIGEST = "4bdaba119c605b03"  # of PLAN.chunk(5, 40)
ALL = AugmentConfig(resized_crop=0.08, brightness=0.4, contrast=2, hue=0.1, erasing=0.25, mixup=0.2, cutmix=1)
AUGMENTED = SamplePlan(3, "noise", 100, 16, padding=4, pixels=28, augment=ALL)


def digest(plan):
    return hashlib.sha256(b"".join(array.tobytes() for array in plan.chunk(5, 40))).hexdigest()[:16]


def equal(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_shapes_types_and_ranges():
    chunk = PLAN.chunk(0, 1000)
    assert [array.shape for array in chunk] == [(1000, 16)] * 4 + [(1000, 16, 0)] * 6
    assert [array.dtype for array in chunk[:4]] == [np.int64, np.int16, np.int16, bool]
    for corner in (chunk.top, chunk.left):
        assert set(np.unique(corner)) == set(range(9))
    assert not np.array_equal(chunk.top, chunk.left)
    assert 0.48 < chunk.flip.mean() < 0.52


@pytest.mark.parametrize("count", [100, 16, 5, 1])
def test_every_epoch_holds_every_sample_once_also_within_one_batch(count):
    plan = SamplePlan(seed=0, task="noise", count=count, batch_size=16, padding=4)
    stream = plan.chunk(0, 50).index.ravel()
    epochs = stream[: len(stream) // count * count].reshape(-1, count)
    assert len(epochs) >= 8
    assert (np.sort(epochs, axis=1) == np.arange(count)).all()
    if count > 1:
        assert len(np.unique(epochs, axis=0)) > 1


@pytest.mark.parametrize("plan", [PLAN, AUGMENTED])
def test_a_stretch_does_not_depend_on_where_it_starts(plan):
    whole = plan.chunk(0, 60)
    assert equal(plan.chunk(13, 30), [array[13:43] for array in whole])
    assert equal(plan.chunk(59, 1), [array[59:] for array in whole])


def test_seed_task_and_epoch_are_hashed_not_added():
    def epoch_of(seed, task, epoch):
        return tuple(SamplePlan(seed, task, 100, 100, 4).chunk(epoch, 1).index[0])

    keys = [(seed, task, epoch) for seed in range(3) for task in ("a", "b") for epoch in range(3)]
    assert len({epoch_of(*key) for key in keys}) == len(keys)


def test_flips_and_crops_do_not_disturb_the_order():
    plain = SamplePlan(3, "noise", 100, 16, padding=0, flip=False).chunk(5, 40)
    assert np.array_equal(plain.index, PLAN.chunk(5, 40).index)
    assert not plain.top.any()
    assert not plain.left.any()
    assert not plain.flip.any()


def test_further_augmentation_leaves_order_crops_and_flips_alone_and_has_torchvisions_ranges():
    chunk = AUGMENTED.chunk(0, 500)
    assert equal(chunk[:4], PLAN.chunk(0, 500)[:4])
    assert [array.shape[2] for array in chunk[4:9]] == [4, 4, 4, 4, 1]
    for box in (chunk.crop, chunk.erase, chunk.cut):
        assert box.dtype == np.int16
        assert (box >= 0).all()
        assert (box[..., :2] + box[..., 2:] <= 28).all()
    height, width = chunk.crop[..., 2], chunk.crop[..., 3]
    assert (height * width >= 0.08 * 784 * 0.85).all()  # sides are rounded
    assert 0.45 < (height * width / 784).mean() < 0.55
    assert np.abs(np.log(height / width)).max() < np.log(4 / 3) + 0.2
    erased = chunk.erase[..., 2] > 0
    assert 0.23 < erased.mean() < 0.27
    assert 0.14 < chunk.erase[erased][:, 2:].prod(1).mean() / 784 < 0.19
    factors = chunk.jitter.reshape(-1, 4)
    np.testing.assert_allclose(factors.min(0), [0.6, 0, 1, -0.1], atol=0.01)
    np.testing.assert_allclose(factors.max(0), [1.4, 3, 1, 0.1], atol=0.01)
    mixed, cut = chunk.share[..., 0] < 1, chunk.cut[..., 2:].all(-1)
    assert 0.45 < mixed.mean() < 0.55
    assert not (mixed & cut).any()
    assert 0.4 < chunk.share[mixed].mean() < 0.6
    assert 0.2 < chunk.cut[~mixed][:, 2:].prod(1).mean() / 784 < 0.5


def test_a_box_that_never_fits():
    """Of 1 x 1 pixels, nothing smaller can be erased, and a crop is the whole image."""
    chunk = SamplePlan(0, "a", 10, 10, 0, pixels=1, augment=AugmentConfig(resized_crop=0.01, erasing=1)).chunk(0, 1)
    assert (chunk.crop == [0, 0, 1, 1]).all()
    assert not chunk.erase[..., 2:].any()


def test_the_plan_is_the_same_in_every_process_and_version():
    """A change of this digest means that no run can be resumed or repeated with its samples."""
    assert digest(PLAN) == DIGEST
    script = f"from tests.data.test_plan import PLAN, digest; assert digest(PLAN) == {DIGEST!r}"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_default_padding():
    assert [default_padding(pixels) for pixels in (28, 32, 33, 64)] == [4, 4, 8, 8]


@pytest.mark.parametrize(("count", "batch_size"), [(0, 16), (10, 0)])
def test_nothing_to_plan(count, batch_size):
    with pytest.raises(ValueError, match=f"task noise: {count} samples and batch_size={batch_size}"):
        SamplePlan(0, "noise", count, batch_size, 4)
