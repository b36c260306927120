"""A learner's reset, shift, statistics and state."""

import pytest
import torch

from dist_cts import models
from dist_cts.algorithms import shifts
from dist_cts.learner import InnerConfig, ResetConfig, TaskLearner
from dist_cts.losses import accuracy, cross_entropy
from dist_cts.models import ModelConfig
from dist_cts.optimizer import make_schedule
from dist_cts.progress import Progress
from tests.helpers.batches import MemoryBatches


def make(task=0, inner=None, **options):
    model, head = models.build(ModelConfig(name="tiny"), 4, task)
    return TaskLearner(str(task), model, head, MemoryBatches(task), inner or InnerConfig(), **options)


def state(learner):
    return {name: value.clone() for name, value in learner.state_dict().items()}


def test_the_shift_leaves_phi_minus_theta_as_it_was():
    learner = make()
    learner.inner_step()
    # Values that fp32 adds without rounding, so that the rule itself is tested to the bit.
    learner.theta.copy_(torch.randint(-1000, 1000, learner.theta.shape) / 64)
    phi = torch.randint(-1000, 1000, learner.theta.shape) / 64
    delta = torch.randint(-1000, 1000, learner.theta.shape) / 64
    before = phi - learner.theta
    head = learner.flat.vector[len(phi) :].clone()
    phi += delta
    shifts.continual(learner, phi, delta, Progress(10, 1))
    assert torch.equal(phi - learner.theta, before)
    assert delta.abs().sum() > 0
    assert torch.equal(learner.flat.vector[len(phi) :], head)


def test_reset_takes_the_body_alone_unless_told_otherwise():
    changed = {}
    for name, reset in {"paper": ResetConfig(), "all": ResetConfig(head=True, optimizer=True, statistics=True)}.items():
        learner = make(reset=reset)
        fresh = state(learner)
        for _ in range(3):
            learner.inner_step()
        trained = state(learner)
        phi = torch.full_like(learner.theta, 0.5)
        learner.reset(phi)
        after = state(learner)
        assert torch.equal(learner.theta, phi)
        head = slice(len(phi), None)
        changed[name] = {
            "head": not torch.equal(after["parameters"][head], trained["parameters"][head]),
            "optimizer": not torch.equal(after["optimizer.momentum_buffer"], trained["optimizer.momentum_buffer"]),
            "statistics": not torch.equal(after["buffers.bn1.running_mean"], trained["buffers.bn1.running_mean"]),
        }
        if name == "all":
            assert torch.equal(after["parameters"][head], fresh["parameters"][head])
            assert torch.equal(after["buffers.bn1.running_mean"], fresh["buffers.bn1.running_mean"])
            assert after["optimizer.momentum_buffer"].count_nonzero() == 0
    assert changed == {"paper": dict.fromkeys(changed["paper"], False), "all": dict.fromkeys(changed["all"], True)}


@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adam"])
def test_a_restored_learner_goes_on_with_the_same_bits(optimizer):
    inner = InnerConfig(optimizer=optimizer, lr=0.01)
    learner, other = make(0, inner), make(0, inner)
    for _ in range(3):
        learner.inner_step()
    other.load_state_dict(state(learner))
    other.batches.seek(3)
    for _ in range(3):
        learner.inner_step()
        other.inner_step()
    for name, value in learner.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_counters_sum_over_the_steps_and_restart_at_zero():
    learner = make()
    expected = []
    for step in range(3):
        model, _ = models.build(ModelConfig(name="tiny"), 4, 0)
        model.load_state_dict(learner.model.state_dict())
        inputs, labels = learner.batches.batch_at(step)
        outputs = model(inputs)
        expected.append((cross_entropy(outputs, labels), accuracy(outputs, labels)))
        learner.inner_step()
    steps, loss, metric, flags = learner.take_counters().tolist()
    assert (steps, flags) == (3, 0)
    assert loss == pytest.approx(sum(loss.item() for loss, _ in expected), rel=1e-6)
    assert metric == pytest.approx(sum(metric.item() for _, metric in expected))
    assert learner.take_counters().tolist() == [0, 0, 0, 0]


def test_every_example_counts_in_an_evaluation():
    learner = make()
    learner.inner_step()
    inputs, labels = torch.randn(13, 3, 8, 8), torch.randint(4, (13,))
    whole = learner.evaluate([(inputs, labels)])
    parts = learner.evaluate([(inputs[:5], labels[:5]), (inputs[5:10], labels[5:10]), (inputs[10:], labels[10:])])
    assert parts == pytest.approx(whole, rel=1e-5)
    assert round(whole["accuracy"] * 13, 4) == round(round(whole["accuracy"] * 13), 4)
    assert learner.model.training


@pytest.mark.parametrize(
    ("name", "expected"), [("multi-step", [1, 1, 1, 1, 0.2, 0.2, 0.2, 0.04, 0.04, 0.008]), ("constant", [1] * 10)]
)
def test_schedules(name, expected):
    learner = make(0, InnerConfig(lr=1.0))
    schedule = make_schedule(learner.optimizer, name, 10)
    rates = []
    for _ in range(10):
        rates.append(learner.optimizer.param_groups[0]["lr"])
        learner.inner_step()
        schedule.step()
    assert rates == pytest.approx(expected)


def test_bf16_autocast_keeps_the_parameters_and_the_update_in_fp32():
    learner, plain = make(autocast=torch.bfloat16), make()
    learner.inner_step()
    plain.inner_step()
    assert learner.theta.dtype == learner.flat.grad.dtype == torch.float32
    assert not torch.equal(learner.theta, plain.theta)
    torch.testing.assert_close(learner.theta, plain.theta, atol=2e-3, rtol=0)


def test_channels_last_computes_the_same():
    plain = make()
    model, head = models.build(ModelConfig(name="tiny"), 4, 0)
    model = model.to(memory_format=torch.channels_last)
    last = TaskLearner("0", model, head, MemoryBatches(0), InnerConfig())
    for _ in range(5):
        plain.inner_step()
        last.inner_step()
    named = last.flat.layout.views(last.flat.vector)
    for name, value in plain.flat.layout.views(plain.flat.vector).items():
        torch.testing.assert_close(named[name], value, atol=1e-5, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_inner_step_on_cuda_equals_the_cpu():
    cpu, device = make(), torch.device("cuda")
    model, head = models.build(ModelConfig(name="tiny"), 4, 0)

    class OnDevice(MemoryBatches):
        def next(self):
            return tuple(tensor.to(device) for tensor in super().next())

    gpu = TaskLearner("0", model.to(device), head, OnDevice(0), InnerConfig())
    for _ in range(5):
        cpu.inner_step()
        gpu.inner_step()
    torch.testing.assert_close(gpu.theta.cpu(), cpu.theta, atol=1e-4, rtol=0)


def test_nesterov_without_momentum_is_refused():
    with pytest.raises(ValueError, match=r"inner\.momentum=0: .*nesterov needs"):
        make(0, InnerConfig(optimizer="nesterov", momentum=0))
