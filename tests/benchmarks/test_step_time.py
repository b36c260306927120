"""The quick form, and that the competitors compute what they are said to."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import learners
import step_time

from dist_cts.distributed.process_group import process_group

CPU = torch.device("cpu")


@pytest.fixture
def alone():
    with process_group(CPU, 60):
        yield


def test_quick_form(tmp_path):
    subprocess.run([sys.executable, step_time.__file__, "--quick", "--out", tmp_path], check=True, timeout=100)
    (result,) = json.loads(next(tmp_path.glob("*-step-time.json")).read_text())["results"].values()
    assert set(result["seconds_per_step"]) == {"cts", "sgd", "ddp", "released"}
    for name, seconds in result["seconds_per_step"].items():
        assert len(seconds) == len(result["cpu_seconds_per_step"][name]) >= 3
        assert all(value > 0 for value in seconds)
    assert all(result["seconds_of_parts"][part] > 0 for part in ("forward, backward", "wait", "all-reduce", "shift"))


def test_the_released_way_and_ours_are_one_algorithm(alone, tmp_path):
    task = learners.noise_task(tmp_path / "noise", pixels=8, count=32)
    cts = learners.MetaTraining([learners.make_learner(task, "tiny", 8, CPU)], 1)
    released = step_time.Released(task, "tiny", 8, CPU)
    start = cts.phi.clone()
    for _ in range(5):
        cts.step()
        released.step()
    assert (cts.phi - start).abs().max() > 1e-4
    for name, value in cts.learners[0].flat.body_layout.views(cts.phi).items():
        torch.testing.assert_close(released.phi[name], value, rtol=0, atol=1e-6)
    for name, value in released.model.named_parameters():
        torch.testing.assert_close(value, dict(cts.learners[0].model.named_parameters())[name], rtol=0, atol=1e-6)


def test_a_second_counts_once():
    watch = step_time.Stopwatch(CPU)
    inner = watch.watch("inner", lambda: time.sleep(0.05))
    watch.watch("outer", lambda: (time.sleep(0.02), inner()))()
    assert watch.seconds["inner"] >= 0.05
    assert 0.02 <= watch.seconds["outer"] < 0.05
