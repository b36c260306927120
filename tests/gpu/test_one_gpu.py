"""On one GPU: the CPU's results, no waiting inside a step, the same bits after a resume.

`pytest -m gpu tests/gpu` needs PyTorch, pytest and what `dist_cts` imports, but not FFCV. GPU_TESTS_DEVICE=cpu runs the
tests on the CPU, which shows that they work.
"""

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils._pytree import tree_flatten

from dist_cts import models
from dist_cts.algorithms.table import ALGORITHMS, MethodConfig, make_algorithm
from dist_cts.checkpoint.manager import CheckpointManager
from dist_cts.checkpoint.schedule import CheckpointConfig
from dist_cts.data.batches import DataConfig, TaskBatches
from dist_cts.data.datasets import DatasetBatches
from dist_cts.data.source import ResidentSource
from dist_cts.distributed.numerics import set_numerics
from dist_cts.distributed.placement import place
from dist_cts.distributed.process_group import process_group
from dist_cts.distributed.reducer import MetaReducer
from dist_cts.learner import InnerConfig, TaskLearner
from dist_cts.meta_train import meta_train
from dist_cts.models import ModelConfig
from dist_cts.progress import Progress
from dist_cts.run.config import TrainConfig
from dist_cts.state import TrainState
from dist_cts.step_graph import use_graphs
from tests.helpers.datasets import Noisy

CPU, DEVICE = torch.device("cpu"), torch.device(os.environ.get("GPU_TESTS_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"
SIZES = [("resnet20", 16, 32), ("resnet18", 16, 32)] if ON_GPU else [("tiny", 8, 8)]  # model, batch size, pixels
OPTIONS = [{}, {"bf16": True}, {"channels_last": True}, {"bf16": True, "channels_last": True}, {"optimizer": "adam"}]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="needs a CUDA device"),
]


class Noise(ResidentSource):
    """A task of random images in device memory."""

    def __init__(self, task, device, pixels, count=64):
        generator = torch.Generator().manual_seed(task)
        self.manifest = SimpleNamespace(name=str(task), count=count, pixels=pixels, classes=4, sha256="")
        self.device, self.labels = device, np.arange(count) % 4
        self.images = torch.randint(256, (count, pixels, pixels, 3), dtype=torch.uint8, generator=generator).to(device)


def make_learner(task, device=DEVICE, size=("tiny", 8, 8), bf16=False, channels_last=False, optimizer="sgd"):
    model, batch_size, pixels = size
    module, head = models.build(ModelConfig(name=model), 4, 0, str(task))
    module = module.to(device, memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    batches = TaskBatches(Noise(task, device, pixels), 0, batch_size, DataConfig(), channels_last=channels_last)
    autocast = torch.bfloat16 if bf16 else None
    return TaskLearner(str(task), module, head, batches, InnerConfig(optimizer=optimizer), autocast=autocast)


def make_state(learners, K=6):
    return TrainState(learners[0].theta.clone(), learners[0].flat.body_layout, learners, Progress(K))


def train(state, steps, algorithm="cts", ranks=1, rank=0, delay=0):
    """Trains for `steps` inner steps from where `state` is; returns its phi."""
    beta, K = 1.0 if algorithm == "mtl" else 0.1, state.progress.inner_steps_per_episode
    row = make_algorithm(algorithm, MethodConfig(delay=delay), inner_steps=K, meta_lr=beta, seed=0)
    reducer = MetaReducer(state.phi, state.learners, place(ranks * len(state.learners), ranks, rank), delay=delay)
    last, state.progress.stopping = state.progress.step + steps, False

    def after_step():
        reducer.received()
        state.progress.stopping = state.progress.step == last

    meta_train(state, row, reducer, beta=beta, M=10**6, K=K, after_step=after_step)
    return state.phi


@pytest.fixture(autouse=True)
def alone():
    """A process group of this process alone, deterministic kernels and full fp32."""
    set_numerics(DEVICE, "fp32", deterministic=True)
    with process_group(DEVICE, 60):
        yield
    torch.use_deterministic_algorithms(False)


def assert_same(first, second):
    assert torch.equal(first.phi, second.phi)
    for a, b in zip(first.learners, second.learners, strict=True):
        a, b = a.state_dict(), b.state_dict()
        assert a.keys() == b.keys()
        assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if name != "random_shifting"])  # draws on the device
def test_every_algorithm_has_the_cpu_s_results(algorithm):
    found, expected = (
        train(make_state([make_learner(task, device) for task in range(2)], K=4), 8, algorithm).cpu()
        for device in (DEVICE, CPU)
    )
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_a_delayed_run_has_the_cpu_s_results():
    found, expected = (
        train(make_state([make_learner(task, device) for task in range(2)], K=6), 12, delay=2).cpu()
        for device in (DEVICE, CPU)
    )
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.skipif(not ON_GPU, reason="a CPU has one precision")
def test_precision_is_what_it_says():
    x = torch.randn(64, 64, 16, 16, device=DEVICE)
    weight = torch.randn(64, 64, 3, 3, device=DEVICE)
    exact = torch.nn.functional.conv2d(x.double(), weight.double()), x.double() @ x.double()
    errors = {}
    for precision in ("fp32", "tf32"):
        set_numerics(DEVICE, precision, deterministic=True)
        found = torch.nn.functional.conv2d(x, weight), x @ x
        errors[precision] = [((a - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]
    assert max(errors["fp32"]) < 1e-5
    if torch.cuda.get_device_capability()[0] >= 8:  # TF32 came with Ampere
        assert min(errors["tf32"]) > 1e-5
    assert max(errors["tf32"]) < 1e-2


@pytest.mark.skipif(not ON_GPU, reason="a CPU waits for nothing")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_no_step_waits_for_the_gpu(algorithm):
    state = make_state([make_learner(task) for task in range(2)])
    train(state, 6, algorithm)
    torch.cuda.set_sync_debug_mode("error")
    try:
        train(state, 6, algorithm)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not ON_GPU, reason="a CPU has no CUDA graphs")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("algorithm", ["cts", "reptile", "fomaml"])
def test_steps_as_graphs_have_the_bits_of_eager_ones(algorithm, size, options):
    eager, graphed = (make_state([make_learner(task, size=size, **options) for task in range(2)]) for _ in range(2))
    use_graphs(graphed.learners)
    train(eager, 15, algorithm)
    train(graphed, 15, algorithm)
    assert_same(graphed, eager)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_resumed_run_has_the_same_bits(size, options, tmp_path):
    def fresh():
        return make_state([make_learner(0, size=size, **options)])

    def checkpoints():
        return CheckpointManager(tmp_path, CheckpointConfig(), place(1, 1, 0))

    config = TrainConfig(tasks=["0"], run_dir=tmp_path)
    whole, first, resumed = fresh(), fresh(), fresh()
    train(whole, 12)
    train(first, 7)  # in the middle of the second episode
    assert checkpoints().save(first, config, wait=True)
    resumed.phi.zero_()
    assert checkpoints().load_newest(resumed, config) == 7
    assert_same(resumed, first)
    train(resumed, 5)
    assert_same(resumed, whole)


def on_one_gpu(rank):
    set_numerics(DEVICE, "fp32", deterministic=True)
    state = make_state([make_learner(rank)])
    dist.broadcast(state.phi, 0)
    return train(state, 12, ranks=2, rank=rank).cpu()


def test_two_ranks_on_one_gpu_are_like_two_tasks_on_one_rank(run_ranks):
    first, second = run_ranks(2, on_one_gpu)
    assert torch.equal(first, second)
    alone = train(make_state([make_learner(task) for task in range(2)]), 12).cpu()
    torch.testing.assert_close(first, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_a_dataset_have_the_cpus_bits(workers):
    """Through pinned memory; the workers start beside a process that uses CUDA."""
    torch.zeros(1, device=DEVICE)
    expected = DatasetBatches(Noisy(), "set", 1, 6)
    batches = DatasetBatches(Noisy(), "set", 1, 6, workers=workers, device=DEVICE)
    for _ in range(5):
        leaves, form = tree_flatten(batches.next())
        others, other_form = tree_flatten(expected.next())
        assert form == other_form
        assert all(leaf.device.type == DEVICE.type and torch.equal(leaf.cpu(), other)
                   for leaf, other in zip(leaves, others, strict=True))  # fmt: skip
    batches.close()
