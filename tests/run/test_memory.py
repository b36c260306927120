"""Batches that cannot fit into memory are refused before the first step; the estimate is a lower bound."""

import pytest
import torch

from dist_cts.data.batches import DataConfig
from dist_cts.models import ModelConfig
from dist_cts.run import memory

CPU = torch.device("cpu")
TINY = ModelConfig(name="tiny")


@pytest.fixture
def check(tasks, monkeypatch):
    """check(free bytes, ranks, sizes, ...): check_batches with that much free memory."""

    def check(free, sizes, ranks=1, cache="auto", **options):
        monkeypatch.setattr(memory, "free_bytes", lambda device: free)
        monkeypatch.setattr(memory.dist, "get_world_size", lambda: ranks)
        return memory.check_batches(sizes, TINY, DataConfig(root=tasks, cache=cache), CPU, **options)

    return check


def test_what_fits_passes_and_a_batch_above_the_dataset_is_a_warning(check):
    assert check(1e9, {"a": 60, "b": 8}) == []
    (warning,) = check(1e9, {"a": 60, "b": 61})
    assert warning.startswith("warning: task b: batch_size=61 exceeds its 60 training images")


def test_what_cannot_fit_is_refused(check):
    """Task a: 8 x 8 pixels. Its 60 images are 11.5 kB; a step on 1000 needs 9 MB."""
    assert check(20e6, {"a": 1000})
    with pytest.raises(ValueError, match=r"^batch_size=1000: a step of task a needs at least .* lower batch_size"):
        check(8e6, {"a": 1000})
    assert check(8e6, {"a": 1000}, ranks=2, sharing=2)
    with pytest.raises(ValueError, match=r"^data.cache=device: the tasks' images need .* set data.cache=stream"):
        check(11e3, {"a": 1}, cache="device")
    check(11e3, {"a": 0}, cache="stream")


def test_a_missing_task_is_left_to_its_opening(check):
    assert check(1e9, {"nothing": 3}) == []


def test_the_bytes_that_a_forward_pass_keeps(monkeypatch):
    """A convolution keeps its input, a ReLU its output, a linear layer its input: 4 bytes per number."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 1), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(80, 2))
    monkeypatch.setattr(memory.models, "build", lambda *arguments: (model, "3"))
    assert memory.saved_bytes(TINY, 4, 2, CPU) == 4 * (3 * 16 + 5 * 16)


def test_the_free_memory_of_a_control_group(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:     5000 kB\n")
    assert memory._host_bytes(tmp_path / "meminfo", tmp_path) == 5000 * 1024
    for name, text in (("memory.max", "3000000"), ("memory.current", "1000000"), ("memory.stat", "inactive_file 500")):
        (tmp_path / name).write_text(text)
    assert memory._host_bytes(tmp_path / "meminfo", tmp_path) == 3_000_000 - 1_000_000 + 500
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._host_bytes(tmp_path / "meminfo", tmp_path) == 5000 * 1024
    assert memory._host_bytes(tmp_path / "none", tmp_path / "none") == float("inf")
