"""The loop on real gloo ranks against the reference implementation."""

import gc
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from dist_cts import models
from dist_cts.algorithms.table import ALGORITHMS
from dist_cts.distributed.placement import Placement, data_group, even_assignment
from dist_cts.distributed.process_group import check_layouts, overlapping_groups
from dist_cts.distributed.reducer import MetaReducer, collectives
from dist_cts.distributed.sync_batch_norm import convert_sync_batch_norm
from dist_cts.flat import FlatLayout, load_named
from dist_cts.learner import InnerConfig, TaskLearner
from dist_cts.meta_train import meta_train
from dist_cts.models import ModelConfig
from dist_cts.progress import Progress
from dist_cts.state import TrainState
from tests.helpers.batches import MemoryBatches
from tests.helpers.reference import meta_train as reference

T, M, K, BETA = 4, 3, 6, 0.5
TINY = ModelConfig(name="tiny")
INNER = {
    "sgd": {"optimizer": "sgd", "lr": 0.05, "momentum": 0.0, "weight_decay": 0.0},
    "momentum and decay": {"optimizer": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4},
    "nesterov": {"optimizer": "nesterov", "lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4},
    "adam": {"optimizer": "adam", "lr": 0.005, "momentum": 0.9, "weight_decay": 5e-4},
}


def make_model(task):
    return models.build(TINY, 3 + task, "head", task)


def named_body(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if not n.startswith("fc.")}


def phi_zero():
    return named_body(models.build(TINY, 1, "phi")[0])


def train(rank, world_size, tasks, inner, algorithm="cts", reduction="mean", watch=nullcontext, delay=0, wire="fp32"):
    """phi after M episodes on this rank; the loop runs inside `watch()`. `tasks`: how many, or the ranks of each."""
    assignment = even_assignment(tasks, world_size) if isinstance(tasks, int) else tasks
    placement = Placement(assignment, world_size, rank)
    group = data_group(placement)
    learners = []
    for task in placement.local_tasks:
        model, head = make_model(task)
        batches = MemoryBatches(task, classes=3 + task, data_rank=placement.data_rank, data_ranks=placement.data_ranks)
        model = convert_sync_batch_norm(model, group)
        learners.append(TaskLearner(str(task), model, head, batches, InnerConfig(**inner), data_group=group))
    layout = FlatLayout.of(phi_zero().items())
    check_layouts(learners[0].flat.body_layout)
    phi = torch.zeros(layout.numel)
    load_named(layout, phi, phi_zero())
    groups = overlapping_groups(phi.device, (delay + 1) * collectives(wire), 60)
    reducer = MetaReducer(phi, learners, placement, reduction, wire=wire, delay=delay, groups=groups)
    state = TrainState(phi, layout, learners, Progress(K))
    with watch():
        meta_train(state, ALGORITHMS[algorithm], reducer, beta=BETA, M=M, K=K)
    return {name: view.clone() for name, view in layout.views(phi).items()}


def oracle(tasks, inner, algorithm="cts", **options):
    learners = [make_model(task)[0] for task in range(tasks)]
    batches = [MemoryBatches(task, classes=3 + task) for task in range(tasks)]
    options |= {"beta": BETA, "M": M, "K": K, "algorithm": algorithm}
    return reference(phi_zero(), learners, lambda t, s: batches[t].batch_at(s), inner, **options)


def assert_close(phi, expected, tolerance):
    assert phi.keys() == expected.keys()
    for name in phi:
        torch.testing.assert_close(phi[name], expected[name], rtol=0, atol=tolerance)


def assert_same_bits(phis):
    for phi in phis[1:]:
        for name in phi:
            assert torch.equal(phi[name], phis[0][name]), name


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_cts_equals_the_oracle_on_any_number_of_ranks(run_ranks, world_size):
    phis = run_ranks(world_size, train, world_size, T, INNER["momentum and decay"])
    assert_same_bits(phis)
    assert_close(phis[0], oracle(T, INNER["momentum and decay"]), 1e-6)


def test_a_data_group_of_two_ranks_equals_one_rank_with_the_whole_batch(run_ranks):
    phis = run_ranks(4, train, 4, 2, INNER["momentum and decay"])
    assert_same_bits(phis)
    assert_close(phis[0], oracle(2, INNER["momentum and decay"]), 1e-6)


def test_data_groups_of_unequal_size_equal_the_oracle(run_ranks):
    phis = run_ranks(6, train, 6, ((0, 1, 2, 3), (4, 5)), INNER["momentum and decay"])
    assert_same_bits(phis)
    assert_close(phis[0], oracle(2, INNER["momentum and decay"]), 1e-6)


@pytest.mark.parametrize("delay", [1, 4])
def test_delayed_cts_equals_the_oracle_on_1_2_and_4_ranks(run_ranks, delay):
    expected, plain = (oracle(T, INNER["momentum and decay"], delay=d) for d in (delay, 0))
    assert max((expected[name] - plain[name]).abs().max() for name in plain) > 1e-3
    for world_size in (1, 2, 4):
        arguments = (world_size, T, INNER["momentum and decay"], "cts", "mean", nullcontext, delay)
        phis = run_ranks(world_size, train, *arguments)
        assert_same_bits(phis)
        assert_close(phis[0], expected, 1e-6)


@pytest.mark.parametrize("inner", ["sgd", "nesterov", "adam"])
def test_inner_optimizers_equal_the_oracle(run_ranks, inner):
    assert_close(run_ranks(2, train, 2, T, INNER[inner])[0], oracle(T, INNER[inner]), 1e-6)


@pytest.mark.parametrize("algorithm", ["no_shifting", "reptile"])
def test_other_rows_equal_the_oracle(run_ranks, algorithm):
    phis = run_ranks(2, train, 2, T, INNER["momentum and decay"], algorithm)
    assert_close(phis[0], oracle(T, INNER["momentum and decay"], algorithm), 1e-6)


@pytest.mark.parametrize("delay", [0, 2])
def test_ordered_reduction_gives_the_same_bits_on_1_2_and_4_ranks(run_ranks, delay):
    options = INNER["momentum and decay"], "cts", "ordered", nullcontext, delay
    phis = [run_ranks(w, train, w, T, *options) for w in (1, 2, 4)]
    assert_same_bits([phi for ranks in phis for phi in ranks])


@pytest.mark.parametrize("delay", [0, 2])
def test_vectors_rounded_to_bf16_give_the_oracle_s_phi_and_the_same_bits_on_1_2_and_4_ranks(run_ranks, delay):
    inner = INNER["momentum and decay"]
    expected, exact = (oracle(T, inner, delay=delay, **wire) for wire in ({"wire": torch.bfloat16}, {}))
    rounding = max((expected[name] - exact[name]).abs().max().item() for name in exact)
    assert rounding > 1e-5  # ten times the tolerance below
    ordered = [run_ranks(w, train, w, T, inner, "cts", "ordered", nullcontext, delay, "bf16") for w in (1, 2, 4)]
    assert_same_bits([phi for ranks in ordered for phi in ranks])
    assert_close(ordered[0][0], expected, 1e-6)
    mean = run_ranks(4, train, 4, T, inner, "cts", "mean", nullcontext, delay, "bf16")  # also rounds its sums
    assert_same_bits(mean)
    assert_close(mean[0], exact, 10 * rounding)


class ReadsBack(TorchDispatchMode):
    """Records every operation that synchronizes with the host: item(), bool(), comparison of tensors."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "equal", "is_nonzero", "nonzero"):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def group_of_one():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("algorithm", ["cts", "no_shifting", "reptile"])
def test_the_hot_path_reads_nothing_back(group_of_one, monkeypatch, algorithm):
    monkeypatch.setattr(MetaReducer, "_receive", lambda self: None)  # reads a copy that is already on the host
    mode = ReadsBack()
    train(0, 1, 1, INNER["momentum and decay"], algorithm, watch=lambda: mode)
    assert mode.found == []
    with mode:
        torch.ones(1).item()
    assert mode.found == ["_local_scalar_dense"]


def vectors(numel):
    """The memory of all tensors of at least that length."""
    gc.collect()
    alive = (x for x in gc.get_objects() if type(x) is torch.Tensor and x.numel() >= numel)
    return {x.untyped_storage().data_ptr() for x in alive}


class Operations(TorchDispatchMode):
    """Counts operations and, in the last inner update, the new vectors of at least `numel`."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.count, self.updates, self.vectors, self.before = numel, 0, 0, 0, vectors(numel)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        self.updates += function.overloadpacket.__name__ == "_fused_sgd_"
        if self.updates == M * K and not self.vectors:
            self.vectors = len(vectors(self.numel) - self.before)
        return function(*args, **(kwargs or {}))


def beside_forward_and_backward(monkeypatch, model, tasks, delay=0):
    """The operations of a run without forward and backward passes, and the number of tensors in the body."""
    monkeypatch.setitem(globals(), "TINY", ModelConfig(name=model))
    loss = torch.zeros(())
    monkeypatch.setattr(TaskLearner, "compute_gradient", lambda self, batch: (loss, loss))
    mode = Operations(FlatLayout.of(phi_zero().items()).numel)
    train(0, 1, tasks, INNER["momentum and decay"], watch=lambda: mode, delay=delay)
    return mode, len(phi_zero())


@pytest.mark.parametrize("tasks", [1, 2])
def test_a_step_takes_as_many_operations_for_few_tensors_as_for_many(group_of_one, monkeypatch, tasks):
    few, tensors = beside_forward_and_backward(monkeypatch, "tiny", tasks)
    many, more_tensors = beside_forward_and_backward(monkeypatch, "resnet20", tasks)
    assert more_tensors > 3 * tensors
    assert few.count == many.count > 0
    # What docs/running.md says: theta, its gradient and momentum of every learner; phi and a buffer per reduction.
    assert many.vectors == 2 + 3 * tasks
    late, _ = beside_forward_and_backward(monkeypatch, "tiny", tasks, delay=3)
    assert late.vectors == few.vectors + 3


def test_a_resumed_progress_counts_on():
    progress, seen = Progress(3), []
    for m in progress.episodes(3):
        for k in progress.inner_steps(3):
            seen.append((m, k, progress.step))
            progress.stopping = progress.step == 4
    assert seen == [(1, 1, 1), (1, 2, 2), (1, 3, 3), (2, 1, 4)]
    resumed = Progress(3, step=4)
    assert not resumed.at_episode_start
    rest = [(m, k, resumed.step) for m in resumed.episodes(3) for k in resumed.inner_steps(3)]
    assert rest == [(2, 2, 5), (2, 3, 6), (3, 1, 7), (3, 2, 8), (3, 3, 9)]
    assert resumed.at_episode_start
