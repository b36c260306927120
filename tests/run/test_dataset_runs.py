"""Runs on PyTorch datasets: layouts, workers, resume, evaluation and meta-test."""

import json
from contextlib import nullcontext

import pytest
import torch

from dist_cts import load_phi
from dist_cts.run import meta_test, train
from dist_cts.run.config import TrainConfig
from dist_cts.run.meta_test import MetaTestConfig
from tests.helpers import datasets
from tests.helpers.commands import records

COMMON = {"model": {"name": "tiny"}, "batch_size": 8}
SHARED = {"sets-2": [2, 0], "sets-0": [1], "sets-1": [3], "sets-3": [1]}  # a data group; ranks with one task and two


def configure(folder, placement="even", episodes=2, workers=0):
    """Four tasks, 10 steps per episode."""
    return TrainConfig(
        tasks=[f"sets-{task}" for task in range(4)], run_dir=folder, meta_lr=0.5, inner_steps=10, episodes=episodes,
        reduction="ordered", placement=placement, eval_every=10, log_every=10, data={"dataset_workers": workers},
        **COMMON,
    )  # fmt: skip


def run(rank, *args):
    """phi of the configured run, on one of its ranks."""
    train.process_group = lambda device, timeout_seconds: nullcontext()  # the ranks are in one already
    config = configure(*args)
    assert train.train(config) == 0
    return load_phi(config.run_dir / "phi.safetensors")


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Four tasks in one process, uninterrupted: the run folder."""
    folder = tmp_path_factory.mktemp("expected")
    assert train.train(configure(folder)) == 0
    return folder


def assert_equal(phi, folder):
    for name, tensor in load_phi(folder / "phi.safetensors").items():
        assert torch.equal(phi[name], tensor), name


def test_a_run_resumes_on_more_ranks_and_with_workers_to_the_bit(run_ranks, expected, tmp_path):
    run_ranks(1, run, tmp_path / "run", "auto", 1, 1)
    measured = json.loads((tmp_path / "run" / "step_seconds.json").read_text())
    assert measured.keys() == {f"sets-{task}" for task in range(4)}
    for phi in run_ranks(2, run, tmp_path / "run"):
        assert_equal(phi, expected)


def test_ranks_that_share_a_task_read_one_batch(run_ranks, expected, tmp_path):
    for phi in run_ranks(4, run, tmp_path / "run", SHARED):
        for name, tensor in load_phi(expected / "phi.safetensors").items():
            torch.testing.assert_close(phi[name], tensor, rtol=0, atol=1e-6)


def test_every_task_is_tested_on_its_test_split(expected):
    tested = [record for record in records(expected) if "test_loss" in record]
    assert [(record["step"], record["task"]) for record in tested] == [
        (step, f"sets-{task}") for step in (10, 20) for task in range(4)
    ]
    assert all(record["wait_seconds"] >= 0 for record in records(expected) if "wait_seconds" in record)


def resume_on_other_data(rank, folder):
    datasets.DATASETS["sets-1"] = lambda split: datasets.Images(7, split)
    with pytest.raises(ValueError, match="task sets-1: its training data changed") as refused:
        run(rank, folder)
    return str(refused.value)


def test_a_run_is_not_resumed_on_other_data(run_ranks, tmp_path):
    run_ranks(1, run, tmp_path, "even", 1)
    [message] = run_ranks(1, resume_on_other_data, tmp_path)
    assert "since checkpoint" in message
    assert "48 samples task 1, now 48 samples task 7; restore them, or pass --fresh" in message


def test_phi_is_adapted_to_a_dataset(expected, tmp_path, monkeypatch):
    config = MetaTestConfig(targets=["sets-3"], seeds=2, steps=5, train_limit=6, eval_points=1, out=tmp_path, **COMMON)
    assert meta_test.meta_test(config, {"cts": str(expected / "phi.safetensors")}) == 0
    summary = json.loads((tmp_path / "meta_test.json").read_text())["summary"]
    assert summary.keys() == {"random", "cts"}
    assert set(summary["cts"]) == {"sets-3"}
    monkeypatch.setitem(datasets.DATASETS, "sets-3", lambda split: datasets.Images(7, split))
    assert meta_test.meta_test(config, {"cts": str(expected / "phi.safetensors")}) == 0
    assert len(list((tmp_path / "jobs").iterdir())) == 8  # no result of other data is reused
