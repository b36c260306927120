"""Shifts on quadratics, where the exact trajectory is known: U_k(phi) = c + (1 - alpha a)^k (phi - c)."""

import pytest
import torch

from dist_cts.algorithms import shifts
from dist_cts.learner import InnerConfig, TaskLearner
from dist_cts.models import ModelConfig, build
from dist_cts.progress import Progress
from tests.helpers.quadratic import ALPHA, make_learner, named, phi_of

A, C = torch.tensor([0.3, 1.0, 4.0]), torch.tensor([1.0, -2.0, 0.5])
DELTA = torch.tensor([0.5, -0.25, 2.0])
K = 7


def after(k, start, inner=None):
    """A learner after k steps from `start`, prepared by begin_exact, and the matching progress."""
    learner = make_learner([(C, A)], **({"inner": inner} if inner else {}))
    learner.reset(phi_of(learner, start))
    shifts.begin_exact(learner)
    progress = Progress(K)
    for _ in range(k):
        learner.inner_step()
        progress.step += 1
    return learner, progress


@pytest.mark.parametrize("k", [1, 3, 6])
def test_the_continual_shift_misses_the_exact_one_by_the_known_gap(k):
    start = torch.tensor([3.0, 3.0, 3.0])
    thetas = {}
    for shift in (shifts.continual, shifts.exact):
        learner, progress = after(k, start)
        delta = phi_of(learner, DELTA)
        shift(learner, phi_of(learner, start + DELTA), delta, progress)
        thetas[shift] = named(learner, learner.theta)
    contraction = (1 - ALPHA * A) ** k
    torch.testing.assert_close(thetas[shifts.exact], C + contraction * (start + DELTA - C))
    torch.testing.assert_close(thetas[shifts.continual] - thetas[shifts.exact], (1 - contraction) * DELTA)


def test_the_exact_shift_is_a_fresh_episode_from_the_new_phi_in_momentum_and_batches_too():
    inner = InnerConfig(optimizer="sgd", lr=ALPHA, momentum=0.9, weight_decay=0.01)
    start, k = torch.zeros(3), 4
    shifted, progress = after(k, start, inner)
    shifts.exact(shifted, phi_of(shifted, DELTA), phi_of(shifted, DELTA), progress)
    fresh, _ = after(k, DELTA, inner)
    for learner in (shifted, fresh):
        learner.inner_step()
    assert torch.equal(shifted.theta, fresh.theta)
    assert shifted.batches.step == fresh.batches.step == k + 1
    assert shifted.counters[0] == k + 1  # replayed steps are not counted


def test_the_exact_shift_replays_nothing_after_the_last_step():
    learner, progress = after(K, torch.zeros(3))
    before = learner.theta.clone()
    shifts.exact(learner, phi_of(learner, DELTA), phi_of(learner, DELTA), progress)
    assert torch.equal(learner.theta, before)


def test_the_continual_shift_leaves_phi_minus_theta_as_it_is_and_scales():
    learner, progress = after(3, torch.zeros(3))
    phi, delta, before = phi_of(learner, torch.zeros(3)), phi_of(learner, DELTA), learner.theta.clone()
    shifts.continual(learner, phi + delta, delta, progress)
    torch.testing.assert_close(phi + delta - learner.theta, phi - before)
    shifts.continual(learner, phi + delta, delta, progress, scale=0.3)
    torch.testing.assert_close(learner.theta - before, 1.3 * delta)


def tiny_learner(classes):
    model, head = build(ModelConfig(name="tiny", width=0.3), classes, 0)
    return TaskLearner("t", model, head, None, InnerConfig())


def random_move(learner, delta, step, seed=0):
    before = learner.flat.vector.clone()
    shifts.random(learner, delta, delta, Progress(100, step), seed=seed)
    moved = learner.flat.vector - before
    assert not moved[learner.theta.numel() :].any()  # the head stays
    return moved[: learner.theta.numel()]


def test_the_random_shift_has_deltas_norm_one_direction_for_all_tasks_and_another_one_every_step():
    learners = [tiny_learner(3), tiny_learner(5)]
    layout = learners[0].flat.body_layout
    delta = torch.zeros_like(learners[0].theta)
    for view in layout.views(delta).values():
        view.fill_(1e-2)
    first, second = (random_move(learner, delta, step=7) for learner in learners)
    torch.testing.assert_close(first, second, rtol=0, atol=1e-6)  # to the rounding of adding it to theta
    torch.testing.assert_close(first.norm(), delta.norm(), rtol=1e-4, atol=0)
    assert sum(view.numel() for view in layout.views(delta).values()) < layout.numel  # there are gaps,
    gaps = torch.ones_like(delta, dtype=torch.bool)
    for view in layout.views(gaps).values():
        view.fill_(False)
    assert not first[gaps].any()  # and they stay zero

    def cosine(other):
        return abs(first @ other / first.norm() / other.norm()).item()

    assert cosine(delta) < 0.5
    assert cosine(random_move(learners[0], delta, step=8)) < 0.5
    assert cosine(random_move(learners[0], delta, step=7, seed=1)) < 0.5


def test_rejoin_puts_theta_on_phi():
    learner, progress = after(2, torch.zeros(3))
    phi = phi_of(learner, DELTA)
    shifts.rejoin(learner, phi, phi, progress)
    assert torch.equal(learner.theta, phi)
