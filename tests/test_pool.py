"""Pools of tasks: which are drawn, phi against the oracle on any layout, and what is refused."""

from collections import Counter
from functools import partial
from itertools import chain

import pytest
import torch

from dist_cts import models
from dist_cts.algorithms.table import ALGORITHMS
from dist_cts.config import find, load
from dist_cts.distributed.placement import place
from dist_cts.distributed.reducer import MetaReducer
from dist_cts.flat import FlatLayout, load_named
from dist_cts.learner import InnerConfig, ResetConfig
from dist_cts.meta_train import meta_train
from dist_cts.models import ModelConfig
from dist_cts.pool import PoolBatches, PoolLearner, draw, share
from dist_cts.progress import Progress
from dist_cts.run.config import TrainConfig
from dist_cts.state import TrainState
from tests.helpers.batches import MemoryBatches, write_task
from tests.helpers.commands import assert_equal, phi
from tests.helpers.reference import meta_train as reference

T, N, M, K, SEED = 7, 4, 8, 3, 5
INNER = {"optimizer": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}


def make_model(task):
    return models.build(ModelConfig(name="tiny"), 4, "head", task)


def phi_zero():
    model, _ = models.build(ModelConfig(name="tiny"), 1, "phi")
    return {n: p.detach().clone() for n, p in model.named_parameters() if not n.startswith("fc.")}


def make_learner(index, reset):
    own = share(T, N, index)
    batches = PoolBatches([partial(MemoryBatches, task) for task in own], map(str, own), SEED, index, K)

    def start(number):
        learner = PoolLearner("", *make_model(own[number]), batches, InnerConfig(**INNER), start=None)
        return learner.flat.vector[len(learner.theta) :]

    return PoolLearner(
        str(index), *make_model(own[0]), batches, InnerConfig(**INNER), start=start, reset=ResetConfig(**reset)
    )


def train(rank, world_size, algorithm, reduction, reset):
    placement = place(N, world_size, rank)
    learners = [make_learner(index, reset) for index in placement.local_tasks]
    layout = FlatLayout.of(phi_zero().items())
    vector = torch.zeros(layout.numel)
    load_named(layout, vector, phi_zero())
    reducer = MetaReducer(vector, learners, placement, reduction)
    meta_train(TrainState(vector, layout, learners, Progress(K)), ALGORITHMS[algorithm], reducer, beta=0.5, M=M, K=K)
    return {name: view.clone() for name, view in layout.views(vector).items()}


def drawn(m):
    """The tasks of episode m in the order of the learners."""
    return [share(T, N, index)[draw(len(share(T, N, index)), SEED, index, m)] for index in range(N)]


def oracle(algorithm="cts"):
    batches = [MemoryBatches(task) for task in range(T)]
    return reference(
        phi_zero(), [make_model(task)[0] for task in range(T)], lambda t, s: batches[t].batch_at(s), INNER,
        beta=0.5, M=M, K=K, algorithm=algorithm, draw=drawn,
    )  # fmt: skip


def test_the_shares_hold_every_task_once_and_each_is_drawn_equally_often():
    for tasks, learners in ((7, 4), (1000, 8), (5, 5), (9, 1)):
        shares = [list(share(tasks, learners, index)) for index in range(learners)]
        assert list(chain.from_iterable(shares)) == list(range(tasks))
        assert {len(own) for own in shares} <= {tasks // learners, -(-tasks // learners)}
    orders = [[draw(6, SEED, 0, 6 * cycle + m) for m in range(6)] for cycle in range(20)]
    assert all(sorted(order) == list(range(6)) for order in orders)
    assert len(set(map(tuple, orders))) > 15
    assert [draw(6, SEED, 1, m) for m in range(6)] not in orders[:1]
    assert set(Counter(task for m in range(2) for task in drawn(m)).values()) <= {1, 2}


@pytest.mark.parametrize(
    ("algorithm", "reduction"),
    [("cts", "ordered"), *(pytest.param(name, "mean", marks=pytest.mark.slow) for name in ("cts", "reptile"))],
)
def test_phi_equals_the_oracle_on_1_2_and_4_ranks(run_ranks, algorithm, reduction):
    expected = oracle(algorithm)
    found = [each for w in (1, 2, 4) for each in run_ranks(w, train, w, algorithm, reduction, {})]
    for each in found:
        for name, value in expected.items():
            torch.testing.assert_close(each[name], value, rtol=0, atol=1e-6)
        if reduction == "ordered":
            assert_equal(each, found[0])


def test_nothing_rests_where_every_episode_resets_everything():
    learner, vector = make_learner(0, {"head": True, "optimizer": True, "statistics": True}), None
    for _ in range(4):
        vector = learner.theta.clone() if vector is None else vector
        learner.reset(vector)
        head = learner.flat.vector[len(vector) :].clone()
        for _ in range(K):
            learner.inner_step()
        assert torch.equal(head, learner.start(learner.task))
    assert learner.resting == {}


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """A folder with the tasks p0 to p5 of 3 classes."""
    folder = tmp_path_factory.mktemp("pool")
    for number in range(6):
        write_task(folder, f"p{number}", count=30, pixels=8 + 4 * (number % 2), seed=number)
    return folder


KEYS = ["tasks=[p0, p1, p2, p3, p4, p5]", "tasks_per_episode=2", "episodes=7", "inner_steps=4", "batch_size=6"]
KEYS += ["meta_lr=0.5", "model={name: tiny}", "reduction=ordered", "device=cpu", "loggers=[]", "log_every=4"]


@pytest.fixture
def run(start, pool, tmp_path):
    """run(name, *keys, **options): phi of a run in the folder `name`."""

    def run(name, *more, **options):
        keys = [*KEYS, f"data.root={pool}", f"run_dir={tmp_path / name}", *more]
        code, _, err = start("train.py", "--config", "pool", *keys, **options).finish()
        assert code in (0, [0, 0]), err
        return phi(tmp_path / name)

    return run


def test_a_run_has_the_same_bits_on_1_and_2_ranks(run):
    assert_equal(run("2", forked=2), run("1"))


@pytest.mark.slow
def test_a_run_has_the_same_bits_streamed(run):
    pytest.importorskip("ffcv")
    assert_equal(run("streamed", "data.cache=stream"), run("resident"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["tasks_per_episode=7"], "tasks_per_episode=7 exceeds the 6 tasks; set at most 6"),
        (["eval_every=4"], "learners change their tasks, which eval_every=4 does not allow"),
        (["placement=auto"], "which placement=auto does not allow"),
        (["algorithm=accurate"], "which algorithm=accurate does not allow"),
        (["few_shot={ways: 2}", "reset.head=true"], "set few_shot.tasks and leave out tasks_per_episode"),
    ],
)
def test_what_makes_no_sense_is_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        load(TrainConfig, find("pool"), [*KEYS, *keys])


def test_tasks_of_other_class_counts_are_refused_with_both_names(start, pool, tmp_path):
    write_task(tmp_path / "tasks", "p0", classes=3)
    write_task(tmp_path / "tasks", "p1", classes=4)
    keys = [*KEYS, "tasks=[p0, p1]", "tasks_per_episode=1", f"data.root={tmp_path / 'tasks'}"]
    code, _, err = start("train.py", "--config", "pool", *keys).finish()
    assert code == 2, err
    assert "p0 has 3 classes and p1 4" in err
