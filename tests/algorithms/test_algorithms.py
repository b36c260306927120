"""Every algorithm against the reference implementation, on 1, 2 and 4 ranks and interrupted; gradient counts."""

import functools

import pytest
import torch
from torch import nn

from dist_cts import models
from dist_cts.algorithms import meta_gradients
from dist_cts.algorithms.meta_gradients import IMAMLConfig
from dist_cts.algorithms.outer import OuterConfig
from dist_cts.algorithms.table import ALGORITHMS, MethodConfig, make_algorithm
from dist_cts.distributed.placement import place
from dist_cts.distributed.process_group import overlapping_groups, process_group
from dist_cts.distributed.reducer import MetaReducer
from dist_cts.flat import load_named
from dist_cts.learner import InnerConfig, TaskLearner
from dist_cts.meta_train import meta_train
from dist_cts.models import ModelConfig
from dist_cts.optimizer import inner_schedule
from dist_cts.progress import Progress
from dist_cts.seeds import hashed_seed
from dist_cts.state import TrainState
from tests.helpers.batches import MemoryBatches
from tests.helpers.reference import meta_train as reference

T, M, K, SEED = 4, 2, 4, 3
TINY = ModelConfig(name="tiny", width=0.5)
INNER = {"optimizer": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}
LAM, CG = 10.0, 4  # lambda above the largest negative curvature, so that conjugate gradient is well posed

# name -> algorithm, beta, options of MethodConfig and of the reference, what differs in the inner and in the outer rule
CASES = {
    "cts": ("cts", 0.5, {}, {}),
    "cts every 2": ("cts", 0.5, {"shift_every": 2}, {"every": 2}),
    "cts with fomaml": (
        "cts",
        0.1,
        {"meta_gradient": "fomaml", "shift_scale": 0.3},
        {"gradient": "fomaml", "scale": 0.3},
    ),
    "cts 2 steps late": ("cts", 0.5, {"delay": 2}, {"delay": 2}),
    "cts every 2, a step late": ("cts", 0.5, {"shift_every": 2, "delay": 1}, {"every": 2, "delay": 1}),
    "no_shifting": ("no_shifting", 0.5, {}, {}),
    "no_shifting a step late": ("no_shifting", 0.5, {"delay": 1}, {"delay": 1}),
    "random_shifting": ("random_shifting", 0.5, {}, {}),
    "random_shifting a step late": ("random_shifting", 0.5, {"delay": 1}, {"delay": 1}),
    "accurate": ("accurate", 0.5, {}, {}),
    "accurate every 2": ("accurate", 0.5, {"shift_every": 2}, {"every": 2}),
    "reptile": ("reptile", 0.5, {}, {}),
    "fomaml": ("fomaml", 0.1, {}, {}),
    "fomaml++": ("fomaml++", 0.1, {}, {}),
    "imaml": ("imaml", 0.1, {"imaml": {"lam": LAM, "cg_iterations": CG}}, {"lam": LAM, "iterations": CG}),
    "leap": ("leap", 0.1, {}, {}),
    "mtl": ("mtl", 1.0, {}, {}),
    "clipped, cosine": ("cts", 0.5, {}, {}, {"clip": 0.5, "schedule": "cosine"}),
    "warm-up, linear": ("accurate", 0.5, {}, {}, {"warmup": 2, "schedule": "linear"}),
    "clipped imaml": (
        "imaml",
        0.1,
        {"imaml": {"lam": LAM, "cg_iterations": CG}},
        {"lam": LAM, "iterations": CG},
        {"clip": 0.5},
    ),
    "anil": ("fomaml", 0.5, {}, {}, {"freeze_body": True}),
    "heavy ball": ("cts", 0.2, {}, {}, {}, {"momentum": 0.7, "schedule": "linear"}),
    "nesterov, a step late": (
        *("cts", 0.2, {"delay": 1}, {"delay": 1}),
        *({}, {"momentum": 0.7, "nesterov": True, "schedule": "cosine"}),
    ),
    "reptile with momentum": ("reptile", 0.5, {}, {}, {}, {"momentum": 0.5}),
    "adamw, warm-up": ("cts", 0.5, {}, {}, {"optimizer": "adamw", "lr": 0.005, "weight_decay": 0.1, "warmup": 2}),
}


def make_model(task):
    return models.build(TINY, 3 + task, "head", task)


def phi_zero():
    model, _ = models.build(TINY, 1, "phi")
    return {n: p.detach().clone() for n, p in model.named_parameters() if not n.startswith("fc.")}


def inner_of(case):
    return INNER | dict(*CASES[case][4:5])


def outer_of(case):
    return dict(*CASES[case][5:])


def make_learners(tasks, inner=INNER):
    inner = InnerConfig(**inner)
    options = {"schedule": inner_schedule(inner, K)}
    return [TaskLearner(str(t), *make_model(t), MemoryBatches(t, classes=3 + t), inner, **options) for t in tasks]


def make(case):
    name, beta, options, *_ = CASES[case]
    return make_algorithm(name, MethodConfig(**options), inner_steps=K, meta_lr=beta, seed=SEED)


def named(learner, vector):
    return {name: view.clone() for name, view in learner.flat.body_layout.views(vector).items()}


def run(case, placement, phi, learners, progress, stop_at=M * K, outer_state=None):
    """Returns the state's `outer_state` after the step `stop_at`; `outer_state`: that of the run that it resumes."""

    def after_step():
        progress.stopping = progress.step == stop_at

    _, beta, options, *_ = CASES[case]
    state = TrainState(phi, learners[0].flat.body_layout, learners, progress)
    state.load_outer_state(outer_state or {})
    groups = overlapping_groups(phi.device, options.get("delay", 0) + 1, 30)
    reducer = MetaReducer(phi, learners, placement, delay=options.get("delay", 0), groups=groups, reduced=state.reduced)
    meta_train(
        state, make(case), reducer, beta=beta, M=M, K=K, outer=OuterConfig(**outer_of(case)), after_step=after_step
    )
    reducer.drain()
    return state.outer_state()


def start(learners):
    phi = torch.zeros_like(learners[0].theta)
    load_named(learners[0].flat.body_layout, phi, phi_zero())
    return phi


def train_all(rank, world_size):
    """phi by every method, on this rank."""
    placement, phis = place(T, world_size, rank), {}
    for case in CASES:
        learners = make_learners(placement.local_tasks, inner_of(case))
        phi = start(learners)
        run(case, placement, phi, learners, Progress(K))
        phis[case] = named(learners[0], phi)
    return phis


def direction(step):
    generator = torch.Generator().manual_seed(hashed_seed(SEED, "random_shifting", step))
    return {name: torch.empty_like(value).normal_(generator=generator) for name, value in phi_zero().items()}


@functools.cache
def oracle(case):
    name, beta, _, options, *_ = CASES[case]
    batches = [MemoryBatches(task, classes=3 + task) for task in range(T)]
    return reference(
        phi_zero(),
        [make_model(task)[0] for task in range(T)],
        lambda task, step: batches[task].batch_at(step),
        inner_of(case),
        beta=beta,
        M=M,
        K=K,
        algorithm=name,
        direction=direction,
        outer=outer_of(case),
        **options,
    )


def largest_difference(phi, other):
    assert phi.keys() == other.keys()
    return max((phi[name] - other[name]).abs().max().item() for name in phi)


@pytest.mark.parametrize("world_size", [1, 2, 4])  # a test each: together they exceed the time limit on a busy machine
def test_every_method_equals_the_reference(run_ranks, world_size):
    assert {case[0] for case in CASES.values()} == ALGORITHMS.keys()
    on_ranks = run_ranks(world_size, train_all, world_size)
    for case in CASES:
        expected = oracle(case)
        assert largest_difference(expected, phi_zero()) > 1e-3, case
        for phis in on_ranks:
            assert largest_difference(phis[case], expected) < 1e-6, case


@pytest.fixture
def alone():
    with process_group(torch.device("cpu"), 30):
        yield place(T, 1, 0)


@pytest.mark.parametrize("case", CASES)
def test_an_episode_interrupted_after_its_second_step_resumes_bit_identically(alone, case):
    uninterrupted = make_learners(range(T), inner_of(case))
    expected = start(uninterrupted)
    run(case, alone, expected, uninterrupted, Progress(K))

    before, progress = make_learners(range(T), inner_of(case)), Progress(K)
    phi = start(before)
    outer_state = run(case, alone, phi, before, progress, stop_at=K + 2)
    assert len(outer_state) == CASES[case][2].get("delay", 0) + ("momentum" in outer_of(case))
    after = make_learners(range(T), inner_of(case))
    for learner, state in zip(after, [learner.state_dict() for learner in before], strict=True):
        learner.load_state_dict({name: value.clone() for name, value in state.items()})
        learner.seek(progress.step)
    run(case, alone, phi, after, Progress(K, progress.step), outer_state=outer_state)
    assert torch.equal(phi, expected)


@pytest.mark.parametrize("case", CASES)
def test_gradient_evaluations_equal_those_counted_in_a_run(alone, case, monkeypatch):
    made = 0

    def counted(function, price):
        def call(*args, **kwargs):
            nonlocal made
            made += price
            return function(*args, **kwargs)

        return call

    learners = make_learners([0])
    learners[0].compute_loss = counted(learners[0].compute_loss, 1)
    operator = meta_gradients.hessian_operator

    def counted_operator(*args):
        gradient, product = operator(*args)
        return gradient, counted(product, 2)

    monkeypatch.setattr(meta_gradients, "hessian_operator", counted_operator)
    run(case, place(1, 1, 0), start(learners), learners, Progress(K))
    assert made == M * make(case).gradient_evaluations(K)


def test_accurate_warns_that_step_k_costs_k_gradients():
    accurate = ALGORITHMS["accurate"]
    assert accurate.gradient_evaluations(1000) == 500500  # 1 + 2 + ... + 1000
    assert accurate.evaluations_per_meta_update(1000) == 500.5
    note = accurate.cost_note(1000)
    assert "500500" in note
    assert "\n" not in note
    assert ALGORITHMS["cts"].cost_note(1000) is None
    assert ALGORITHMS["reptile"].evaluations_per_meta_update(1000) == 1000


@pytest.mark.parametrize("inner_steps", [1, 3])
@pytest.mark.parametrize("optimizer", ["sgd", "nesterov"])
def test_mtl_is_joint_sgd_on_the_mean_loss_over_tasks(alone, optimizer, inner_steps):
    """With momentum and weight decay: momentum is linear, so the tasks' momenta add up. Heads follow their own loss."""
    inner, steps = INNER | {"optimizer": optimizer}, 6
    learners = make_learners(range(T), inner)
    phi = start(learners)
    algorithm = make_algorithm("mtl", MethodConfig(), inner_steps=inner_steps, meta_lr=1, seed=0)
    progress = Progress(inner_steps)
    reducer = MetaReducer(phi, learners, alone)
    state = TrainState(phi, learners[0].flat.body_layout, learners, progress)
    meta_train(state, algorithm, reducer, beta=1, M=steps // inner_steps, K=inner_steps)

    joint = [make_model(task)[0] for task in range(T)]
    body = {name: nn.Parameter(value) for name, value in phi_zero().items()}
    heads = [p for model in joint for n, p in model.named_parameters() if n.startswith("fc.")]
    sgd = torch.optim.SGD(
        [{"params": body.values()}, {"params": heads, "lr": T * inner["lr"], "weight_decay": 5e-4 / T}],
        lr=inner["lr"],
        momentum=0.9,
        weight_decay=5e-4,
        nesterov=optimizer == "nesterov",
    )
    batches = [MemoryBatches(task, classes=3 + task) for task in range(T)]
    for step in range(steps):
        losses = []
        for model, source in zip(joint, batches, strict=True):
            x, y = source.batch_at(step)
            losses.append(nn.functional.cross_entropy(torch.func.functional_call(model, body, x), y))
        sgd.zero_grad()
        (sum(losses) / T).backward()
        sgd.step()
    assert largest_difference(named(learners[0], phi), {n: p.detach() for n, p in body.items()}) < 1e-6


def test_mtl_with_one_task_is_plain_training(alone):
    learners = make_learners([0])
    phi = start(learners)
    run("mtl", place(1, 1, 0), phi, learners, Progress(K))
    plain = make_learners([0])[0]
    plain.theta.copy_(start([plain]))
    for _ in range(M * K):
        plain.inner_step()
    torch.testing.assert_close(phi, plain.theta, rtol=0, atol=1e-6)


BAD = {
    "algorithm='ctss': unknown; did you mean cts": ("ctss", {}),
    "shift_every=1: algorithm=imaml updates phi once per episode": ("imaml", {"shift_every": 1}),
    "shift_every=2: algorithm=reptile updates phi once per episode": ("reptile", {"shift_every": 2}),
    "shift_scale=0.5: algorithm=reptile .* without shift": ("reptile", {"shift_scale": 0.5}),
    "shift_scale=0.5: algorithm=accurate does not use it": ("accurate", {"shift_scale": 0.5}),
    "shift_scale=0.5: algorithm=no_shifting": ("no_shifting", {"shift_scale": 0.5}),
    "meta_gradient=fomaml: algorithm=reptile": ("reptile", {"meta_gradient": "fomaml"}),
    "shift_every=2: algorithm=mtl": ("mtl", {"shift_every": 2}),
    "gradient_batch=next: algorithm=leap": ("leap", {"gradient_batch": "next"}),
    "gradient_batch=next: the Reptile difference uses no batch": ("cts", {"gradient_batch": "next"}),
    "delay=2: algorithm=reptile updates phi once per episode": ("reptile", {"delay": 2}),
    "delay=2: algorithm=accurate does not use it": ("accurate", {"delay": 2}),
    "delay=2: algorithm=mtl does not use it": ("mtl", {"delay": 2}),
    "delay=10 must be below inner_steps=10": ("cts", {"delay": 10}),
    "shift_every=3 does not divide inner_steps=10: the last 1 steps": ("cts", {"shift_every": 3}),
}


@pytest.mark.parametrize("message", BAD)
def test_incompatible_options_are_refused(message):
    name, options = BAD[message]
    with pytest.raises(ValueError, match=message):
        make_algorithm(name, MethodConfig(**options), inner_steps=10, meta_lr=1, seed=0)


@pytest.mark.parametrize("name", ["imaml", "leap"])
def test_a_method_that_needs_a_trajectory_refuses_one_step(name):
    with pytest.raises(ValueError, match="needs a trajectory: set inner_steps"):
        make_algorithm(name, MethodConfig(), inner_steps=1, meta_lr=1, seed=0)


def test_mtl_refuses_another_meta_lr_than_1():
    with pytest.raises(ValueError, match=r"set meta_lr=1, not 0\.01"):
        make_algorithm("mtl", MethodConfig(), inner_steps=10, meta_lr=0.01, seed=0)


def imaml_in_a_data_group(rank):
    from dist_cts.distributed.placement import data_group

    learner = make_learners([0])[0]
    learner.data_group = data_group(place(1, 2, rank))
    try:
        ALGORITHMS["imaml"].begin(learner)
    except ValueError as error:
        return str(error)


def test_imaml_refuses_to_share_a_task_between_ranks(run_ranks):
    for message in run_ranks(2, imaml_in_a_data_group):
        assert "2 ranks share task 0" in message


def test_imaml_counts_a_second_gradient_on_the_next_batch():
    options = MethodConfig(gradient_batch="next", imaml=IMAMLConfig(cg_iterations=3))
    row = make_algorithm("imaml", options, inner_steps=10, meta_lr=1, seed=0)
    assert row.gradient_evaluations(10) == 10 + 2 + 6
