"""Dropout and stochastic depth follow from (seed, task, step): against the oracle, on any layout, after a resume."""

import pytest
import torch
from torch import nn
from torchvision.ops import StochasticDepth

from dist_cts.algorithms.table import ALGORITHMS
from dist_cts.distributed.placement import Placement, data_group, even_assignment
from dist_cts.distributed.reducer import MetaReducer
from dist_cts.flat import Parts, load_named
from dist_cts.learner import InnerConfig, TaskLearner
from dist_cts.meta_train import meta_train
from dist_cts.models import SeededMasks
from dist_cts.progress import Progress
from dist_cts.seeds import hashed_seed
from dist_cts.state import TrainState
from tests.helpers.batches import MemoryBatches
from tests.helpers.reference import meta_train as reference

M, K, BETA, CPU = 2, 4, 0.5, torch.device("cpu")
INNER = {"optimizer": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}


class Noisy(nn.Module):
    """Group norm, attention and four kinds of random layers; no batch norm."""

    def __init__(self, classes):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2, 1)
        self.norm = nn.GroupNorm(2, 8)
        self.residual = nn.Conv2d(8, 8, 3, 1, 1)
        self.drop2d, self.depth = nn.Dropout2d(0.2), StochasticDepth(0.3, "row")
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.2, batch_first=True)
        self.drop = nn.Dropout(0.3)
        self.fc = nn.Linear(8, classes)

    def forward(self, x):
        x = self.drop2d(self.norm(self.conv(x)))
        x = x + self.depth(self.residual(torch.relu(x)))
        x = x.flatten(2).mT
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.fc(self.drop(x.mean(1)))


def make_model(task, seed=0):
    torch.manual_seed(100 + 10 * seed + task)
    model = Noisy(3 + task)
    model.conv.bias.requires_grad_(False)  # frozen, and the same in all tasks
    model.conv.bias.data.fill_(0.1)
    return model


HEAD = frozenset({"fc.weight", "fc.bias"})
PARTS = Parts(HEAD, frozenset({"conv.bias", "attention.in_proj_bias"}))  # the second is private


def phi_zero():
    left_out = PARTS.head | PARTS.rest
    return {n: p.detach().clone() for n, p in make_model(0, seed=1).named_parameters() if n not in left_out}


def start(rank, world_size, tasks):
    placement = Placement(even_assignment(tasks, world_size), world_size, rank)
    group, learners = data_group(placement), []
    share = {"data_rank": placement.data_rank, "data_ranks": placement.data_ranks}
    for task in placement.local_tasks:
        batches = MemoryBatches(task, classes=3 + task, **share)
        learners.append(
            TaskLearner(str(task), make_model(task), PARTS, batches, InnerConfig(**INNER), data_group=group)
        )
        learners[-1].masks = SeededMasks(CPU, 7, task, **share)
    layout = learners[0].flat.body_layout
    phi = torch.zeros(layout.numel)
    load_named(layout, phi, phi_zero())
    return TrainState(phi, layout, learners, Progress(K)), placement


def train(rank, world_size, tasks, algorithm, reduction="mean"):
    state, placement = start(rank, world_size, tasks)
    reducer = MetaReducer(state.phi, state.learners, placement, reduction)
    meta_train(state, ALGORITHMS[algorithm], reducer, beta=BETA, M=M, K=K)
    return {name: view.clone() for name, view in state.layout.views(state.phi).items()}


def oracle(tasks, algorithm):
    """torch's global generator is seeded right before every forward pass."""
    batches = [MemoryBatches(task, classes=3 + task) for task in range(tasks)]

    def batch_at(task, step):
        batch = batches[task].batch_at(step)
        torch.manual_seed(hashed_seed(7, task, "masks", step))
        return batch

    models = [make_model(task) for task in range(tasks)]
    return reference(
        phi_zero(), models, batch_at, INNER, beta=BETA, M=M, K=K, algorithm=algorithm, head=PARTS.head | PARTS.rest
    )


def assert_close(phi, expected):
    assert phi.keys() == expected.keys()
    for name in phi:
        torch.testing.assert_close(phi[name], expected[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("ranks", "tasks", "algorithm"),
    [(1, 2, "cts"), (2, 2, "cts"), (4, 2, "cts"), (1, 2, "accurate"), (2, 1, "accurate"), (2, 1, "fomaml")],
)
def test_every_layout_equals_the_oracle(run_ranks, ranks, tasks, algorithm):
    phis = run_ranks(ranks, train, ranks, tasks, algorithm)
    assert_close(phis[0], oracle(tasks, algorithm))
    assert all(torch.equal(phi[name], phis[0][name]) for phi in phis for name in phi)


def test_ordered_reduction_gives_the_same_bits_on_1_and_2_ranks(run_ranks):
    one, two = (run_ranks(ranks, train, ranks, 2, "cts", "ordered") for ranks in (1, 2))
    assert all(torch.equal(one[0][name], two[1][name]) for name in one[0])


def test_a_resumed_learner_draws_the_masks_of_its_step_whatever_came_before():
    learner, other = (start(0, 1, 1)[0].learners[0] for _ in range(2))
    for _ in range(3):
        learner.inner_step()
    other.load_state_dict({name: value.clone() for name, value in learner.state_dict().items()})
    other.seek(3)
    torch.rand(5)
    learner.inner_step(), other.inner_step()
    assert torch.equal(learner.flat.vector, other.flat.vector)


def test_a_batch_has_the_same_masks_before_and_after_its_step_and_others_have_their_own():
    learner = start(0, 1, 1)[0].learners[0]
    state = torch.get_rng_state()
    batch = learner.peek()
    same = [learner.compute_loss(batch)[0] for _ in range(2)]
    learner.optimizer.param_groups[0]["lr"] = 0.0
    learner.inner_step()
    same += [learner.loss, learner.compute_loss(learner.batch)[0]]
    assert len({loss.item() for loss in same}) == 1
    assert torch.equal(torch.get_rng_state(), state)
    learner.step, learner.batch = 1, None
    assert learner.compute_loss(batch)[0].item() != same[0].item()


@pytest.mark.parametrize(
    "args", [{"drop_path_rate": 0.3}, {"proj_drop_rate": 0.2, "attn_drop_rate": 0.2}, {"patch_drop_rate": 0.3}]
)
def test_two_data_ranks_draw_the_full_batch_s_masks_in_timm_s_layers(args):
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=5, **args)
    x = torch.randn(8, 3, 32, 32)
    with torch.no_grad(), SeededMasks(CPU, 1)(3, 8):
        whole = model(x)
    halves = []
    for rank in range(2):
        with torch.no_grad(), SeededMasks(CPU, 1, data_rank=rank, data_ranks=2)(3, 4):
            halves.append(model(x[4 * rank : 4 * rank + 4]))
    torch.testing.assert_close(torch.cat(halves), whole, rtol=0, atol=1e-5)
    assert not torch.allclose(halves[0], model.eval()(x[:4]), atol=1e-3)


def test_masks_keep_the_memory_format_of_channels_last_images():
    x = torch.randn(4, 3, 4, 4).to(memory_format=torch.channels_last)
    drop = nn.Dropout(0.5)
    with SeededMasks(CPU, 1)(0, 4):
        whole = drop(x)
    with SeededMasks(CPU, 1, data_rank=1, data_ranks=2)(0, 2):
        half = drop(x[2:])
    assert torch.equal(half, whole[2:])
