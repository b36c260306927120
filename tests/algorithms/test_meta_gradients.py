"""Meta-gradients against closed forms on quadratics, where H = diag(a)."""

from itertools import pairwise

import pytest
import torch

from dist_cts.algorithms import meta_gradients
from dist_cts.algorithms.meta_gradients import IMAMLConfig, LeapConfig
from dist_cts.learner import InnerConfig, TaskLearner
from dist_cts.models import ModelConfig, build
from tests.helpers.batches import MemoryBatches
from tests.helpers.quadratic import ALPHA, make_learner, named, phi_of

A, C = torch.tensor([0.3, 1.0, 4.0, 0.0, 2.0]), torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0])
START = torch.tensor([3.0, 3.0, -3.0, 1.0, 0.0])
OTHER = (torch.tensor([0.0, 5.0, 1.0, 1.0, 2.0]), torch.tensor([1.0, 2.0, 0.5, 1.0, 0.1]))


def episode(steps, batches=((C, A),), begin=None, observe=None, **options):
    """A learner after `steps` inner steps from START, and phi."""
    learner = make_learner(list(batches), **options)
    phi = phi_of(learner, START[: learner.model.w.numel()])
    learner.reset(phi)
    if begin is not None:
        begin(learner)
    with torch.no_grad():
        for _ in range(steps):
            learner.inner_step(observe)
    return learner, phi


def in_closed_form(k, a=A):
    return C + (1 - ALPHA * a) ** k * (START - C)


def test_fomaml_is_the_last_batchs_gradient_at_theta_k():
    learner, phi = episode(4)
    got = named(learner, meta_gradients.fomaml(learner, phi))
    torch.testing.assert_close(got, A * (in_closed_form(4) - C))


def test_fomaml_on_the_next_batch_does_not_consume_it():
    c, a = OTHER
    learner, phi = episode(4, batches=[(C, A)] * 4 + [OTHER, (C, A)])
    theta = named(learner, learner.theta).clone()
    got = named(learner, meta_gradients.fomaml(learner, phi, batch="next"))
    torch.testing.assert_close(got, a * (theta - c))
    learner.inner_step()
    torch.testing.assert_close(named(learner, learner.theta), theta - ALPHA * a * (theta - c))
    learner.inner_step()
    assert learner.batches.step == 6


def test_fomaml_plus_plus_is_the_mean_inner_gradient_and_with_plain_sgd_reptile_on_another_scale():
    begin, observe = meta_gradients.begin_fomaml_plus_plus, meta_gradients.observe_fomaml_plus_plus
    learner, phi = episode(6, begin=begin, observe=observe)
    got = named(learner, meta_gradients.fomaml_plus_plus(learner, phi)).clone()
    torch.testing.assert_close(got, sum(A * (in_closed_form(k) - C) for k in range(6)) / 6)
    torch.testing.assert_close(got, named(learner, meta_gradients.reptile(learner, phi)) / (6 * ALPHA))
    # MAML++'s mean over theta_1 .. theta_K differs by 1 / K of one gradient's change along the episode.
    plus_plus = sum(A * (in_closed_form(k) - C) for k in range(1, 7)) / 6
    torch.testing.assert_close(plus_plus - got, A * (in_closed_form(6) - in_closed_form(0)) / 6)


def test_fomaml_plus_plus_has_no_weight_decay_in_it():
    begin, observe = meta_gradients.begin_fomaml_plus_plus, meta_gradients.observe_fomaml_plus_plus
    inner = InnerConfig(lr=ALPHA, momentum=0, weight_decay=0.1)
    learner, phi = episode(1, begin=begin, observe=observe, inner=inner)
    torch.testing.assert_close(named(learner, meta_gradients.fomaml_plus_plus(learner, phi)), A * (START - C))


@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_imaml_divides_the_gradient_by_one_plus_curvature_over_lambda(damping):
    options = IMAMLConfig(lam=0.7, cg_iterations=5, damping=damping, proximal=False)
    learner, phi = episode(3)
    got = named(learner, meta_gradients.imaml(learner, phi, options))
    torch.testing.assert_close(got, A * (in_closed_form(3) - C) / (1 + damping + A / 0.7))


def test_imaml_with_its_proximal_term_is_the_true_gradient_of_the_adapted_loss():
    options = IMAMLConfig(lam=0.7, cg_iterations=5)
    learner, phi = episode(
        300, begin=meta_gradients.begin_imaml, observe=lambda learner: meta_gradients.observe_imaml(learner, options)
    )
    w = START.clone().requires_grad_()
    solution = (A * C + 0.7 * w) / (A + 0.7)  # argmin of L + lambda/2 ||theta - phi||^2
    torch.testing.assert_close(named(learner, learner.theta), solution.detach())
    expected = torch.autograd.grad(0.5 * (A * (solution - C) ** 2).sum(), w)[0]
    torch.testing.assert_close(named(learner, meta_gradients.imaml(learner, phi, options)), expected)


def test_imaml_may_take_its_gradient_from_the_next_batch_and_its_hessian_from_the_last():
    c, a = OTHER
    options = IMAMLConfig(lam=0.7, cg_iterations=5)
    learner, phi = episode(2, batches=[(C, A), (C, A), OTHER])
    got = named(learner, meta_gradients.imaml(learner, phi, options, batch="next"))
    torch.testing.assert_close(got, a * (in_closed_form(2) - c) / (1 + A / 0.7))


def test_conjugate_gradient_stops_at_the_solution_and_at_negative_curvature():
    b = torch.tensor([1.0, 2.0, 3.0])
    solve = meta_gradients.conjugate_gradient
    torch.testing.assert_close(solve(lambda v: 2 * v, b, 50), b / 2)
    torch.testing.assert_close(solve(lambda v: -v, b, 50), b)
    assert torch.equal(solve(lambda v: 2 * v, torch.zeros(3), 5), torch.zeros(3))
    indefinite = torch.tensor([2.0, -1.0, 1.0])
    assert solve(lambda v: indefinite * v, b, 50).isfinite().all()


def leap(steps, options, **kwargs):
    learner, phi = episode(
        steps,
        begin=meta_gradients.begin_leap,
        observe=lambda learner: meta_gradients.observe_leap(learner, options),
        **kwargs,
    )
    return named(learner, meta_gradients.leap(learner, phi))


def length_gradients(points, options):
    """Sum over the segments of the gradient, at the start, of the length to the fixed end; by autograd."""
    total = torch.zeros_like(points[0][0])
    for (theta, (c, a)), (end, (c_end, a_end)) in pairwise(points):
        theta = theta.clone().requires_grad_()
        square = ((end - theta) ** 2).sum()
        if options.loss:
            square = square + (0.5 * (a_end * (end - c_end) ** 2).sum() - 0.5 * (a * (theta - c) ** 2).sum()) ** 2
        total += torch.autograd.grad(square.sqrt() if options.norm else square / 2, theta)[0]
    return total


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("loss", [True, False])
def test_leap_is_the_gradient_of_the_path_from_theta_0_to_theta_k_minus_1(norm, loss):
    options = LeapConfig(norm=norm, loss=loss)
    points = [(in_closed_form(k), (C, A)) for k in range(6)]
    torch.testing.assert_close(leap(6, options), length_gradients(points, options), rtol=1e-4, atol=1e-5)


def test_leaps_stabilizer_reverses_an_increase_of_the_loss():
    batches = [(C, A), (C, 2 * A)]
    points = [(START, batches[0]), (in_closed_form(1), batches[1])]
    losses = [0.5 * (a * (theta - c) ** 2).sum() for theta, (c, a) in points]
    assert losses[1] > losses[0]
    plain, stable = LeapConfig(stabilizer=False), LeapConfig()
    torch.testing.assert_close(leap(2, plain, batches=batches), length_gradients(points, plain), rtol=1e-4, atol=1e-5)
    step, rise = points[1][0] - points[0][0], losses[1] - losses[0]
    expected = (-step + rise * A * (START - C)) / (step @ step + rise * rise).sqrt()
    torch.testing.assert_close(leap(2, stable, batches=batches), expected, rtol=1e-4, atol=1e-5)


def test_leaps_head_may_count_in_the_length_and_never_in_the_gradient():
    head = 2  # of five parameters; it starts from 0
    start = torch.cat((START[:-head], torch.zeros(head)))
    after = start - ALPHA * A * (start - C)
    losses = [0.5 * (A * (theta - C) ** 2).sum() for theta in (start, after)]
    pull = ((start - after) + (losses[0] - losses[1]) * A * (start - C))[:-head]
    for option, moved in ((False, (after - start)[:-head]), (True, after - start)):
        length = (moved @ moved + (losses[1] - losses[0]) ** 2).sqrt()
        got = leap(2, LeapConfig(head=option), head=head)
        torch.testing.assert_close(got, pull / length)


def test_leap_without_movement_is_zero():
    assert not leap(4, LeapConfig(), batches=[(START, A)]).any()


def test_extra_gradients_leave_the_running_statistics_alone():
    model, head = build(ModelConfig(name="tiny"), 3, 0)
    learner = TaskLearner("t", model, head, MemoryBatches(0, classes=3), InnerConfig())
    learner.inner_step()
    before = [buffer.clone() for buffer in model.buffers()]
    meta_gradients.fomaml(learner, learner.theta)
    meta_gradients.imaml(learner, learner.theta, IMAMLConfig(cg_iterations=2))
    for now, then in zip(model.buffers(), before, strict=True):
        assert torch.equal(now, then)
