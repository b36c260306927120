"""Batches that cannot fit into memory are refused before the first step; the estimate is a lower bound."""

import pytest
import torch

from dist_cts.data.batches import DataConfig
from dist_cts.models import ModelConfig
from dist_cts.run import memory, train
from dist_cts.run.config import TrainConfig
from dist_cts.run.meta_test import MetaTestConfig, run_jobs
from dist_cts.run.script import meta_test_tasks, meta_train_tasks

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
    assert memory.saved_bytes(TINY, torch.zeros(2, 3, 4, 4), 2, CPU) == 4 * (3 * 16 + 5 * 16)


@pytest.mark.parametrize(
    ("line", "folder", "names"),
    [
        ("4:memory:/slurm/job", "memory/slurm", ("memory.limit_in_bytes", "memory.usage_in_bytes")),
        ("0::/slurm/job", "slurm", ("memory.max", "memory.current")),
        ("0::/", "", ("memory.max", "memory.current")),
    ],
)
def test_the_free_memory_of_the_control_groups(tmp_path, line, folder, names):
    """The limit of the job's group holds, here of the one above the process's own."""
    places = meminfo, own, root = tmp_path / "meminfo", tmp_path / "own", tmp_path / "root"
    meminfo.write_text("MemTotal: 9 kB\nMemAvailable:     5000 kB\n")
    assert memory._host_bytes(*places) == 5000 * 1024
    own.write_text(f"5:cpu:/slurm\n{line}\n")
    group = root / folder
    group.mkdir(parents=True, exist_ok=True)
    assert memory._host_bytes(*places) == 5000 * 1024
    for name, text in zip((*names, "memory.stat"), ("3000000", "1000000", "inactive_file 500"), strict=True):
        (group / name).write_text(text)
    assert memory._host_bytes(*places) == 3_000_000 - 1_000_000 + 500
    (group / names[0]).write_text("max\n")
    assert memory._host_bytes(*places) == 5000 * 1024
    assert memory._host_bytes(*3 * [tmp_path / "none"]) == float("inf")


class Sequences(torch.utils.data.Dataset):
    """8 samples of 1000 numbers, as a dict."""

    classes = 2

    def __init__(self, split):
        pass

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"numbers": torch.zeros(1000)}, index % 2


class Wide(torch.nn.Module):
    """Keeps 1000 numbers per sample for its backward pass."""

    def __init__(self, classes):
        super().__init__()
        self.body, self.head = torch.nn.Linear(1000, 10), torch.nn.Linear(10, classes)

    def forward(self, inputs):
        return self.head(self.body(inputs["numbers"]))


@pytest.mark.parametrize("pool", [0, 1])
def test_a_batch_of_a_dataset_that_cannot_fit_is_refused(monkeypatch, pool):
    """100 samples: 0.4 MB of inputs, and as much for the backward pass."""
    pool = {"tasks_per_episode": pool}

    def train(free, batch_size):
        monkeypatch.setattr(memory, "free_bytes", lambda device: free)
        return meta_train_tasks(
            {"sequences": Sequences}, Wide, episodes=1, inner_steps=1, batch_size=batch_size, **pool
        )

    assert train(9e5, 100).code == 0
    for free in (3e5, 7e5):
        with pytest.raises(ValueError, match=r"^batch_size=100: a step of task sequences needs at least .* lower"):
            train(free, 100)
    with pytest.raises(ValueError, match=r"^batch_size=100: a step of task sequences needs"):
        meta_test_tasks({"sequences": Sequences}, {}, Wide, batch_size=100, steps=1, seeds=1)


def test_a_pool_of_few_shot_tasks_and_adaptations_together_count(check, tasks, tmp_path):
    few_shot, common = {"ways": 3, "shots": 2}, {"batch_size": 1000, "model": TINY, "device": "cpu"}
    check(8e6, {"a": 1})  # the free memory that follows
    config = TrainConfig(tasks=["a"], few_shot=few_shot, reset={"head": True}, data={"root": tasks}, **common)
    with pytest.raises(ValueError, match=r"^batch_size=1000: a step of task a needs"):
        train.train(config.model_copy(update={"run_dir": tmp_path}))
    config = MetaTestConfig(targets=["a"], few_shot=few_shot, steps=1, data={"root": tasks}, **common)
    with pytest.raises(ValueError, match=r"^batch_size=100: a step of task a needs"):
        run_jobs(config.model_copy(update={"batch_size": 100, "together": 10}), {})
