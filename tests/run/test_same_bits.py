"""Whole runs give the same bits from device memory and from streams, on 1 and 4 ranks, and twice with 2 threads."""

import pytest

from tests.helpers.commands import assert_equal, phi

pytestmark = pytest.mark.slow


@pytest.fixture
def train(start, tasks, tmp_path):
    """train(name, *keys, **options): phi of a run of tasks a to d in the folder `name`."""
    (tmp_path / "empty.yaml").touch()
    keys = ["tasks=[a, b, c, d]", "episodes=2", "inner_steps=5", "batch_size=16", "meta_lr=0.5", "device=cpu"]
    keys += [f"data.root={tasks}", "model={name: tiny}", "reduction=ordered"]

    def train(name, *more, **options):
        command = start(
            "train.py", "--config", tmp_path / "empty.yaml", *keys, *more, f"run_dir={tmp_path / name}", **options
        )
        code, _, err = command.finish()
        assert code in (0, [0] * 4), err
        return phi(tmp_path / name)

    return train


def test_streams_and_device_memory_on_1_and_4_ranks(train):
    pytest.importorskip("ffcv")
    expected = train("device", "data.cache=device")
    for cache, ranks in (("stream", None), ("device", 4), ("stream", 4)):
        assert_equal(train(f"{cache}-{ranks}", f"data.cache={cache}", forked=ranks), expected)


def test_the_same_seed_twice_on_4_ranks_with_2_threads_each(train):
    first, second = (train(name, ranks=4, environment={"OMP_NUM_THREADS": "2"}) for name in ("first", "second"))
    assert_equal(first, second)
