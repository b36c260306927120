"""The competitors compute the same algorithm."""

import time

import pytest
import torch

from benchmarks import learners, many_tasks, step_time
from dist_cts.distributed.process_group import process_group

CPU = torch.device("cpu")


@pytest.fixture
def alone():
    with process_group(CPU, 60):
        yield


def test_the_released_way_and_ours_are_one_algorithm(alone):
    noise = learners.Noise(CPU, pixels=8, count=32)
    cts = learners.MetaTraining([learners.make_learner(noise, "tiny", 8)], 1)
    released = step_time.Released(noise, "tiny", 8)
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


@pytest.mark.parametrize("benchmark", [step_time, many_tasks])
def test_a_graph_needs_a_gpu(benchmark, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--graph"])
    assert "--graph needs --device cuda, not cpu" in capsys.readouterr().err
