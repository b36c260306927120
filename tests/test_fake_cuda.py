"""Training on fake CUDA tensors, which have a device and a shape but no memory, so that no GPU is needed.

Finds tensors on the wrong device, dtypes that CUDA refuses, lost memory formats, and steps that wait for the GPU.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_cts import models
from dist_cts.algorithms.table import ALGORITHMS, MethodConfig, make_algorithm
from dist_cts.data.batches import DataConfig, TaskBatches
from dist_cts.data.source import ResidentSource
from dist_cts.distributed.placement import data_group, place
from dist_cts.distributed.reducer import MetaReducer
from dist_cts.distributed.sync_batch_norm import convert_sync_batch_norm
from dist_cts.learner import InnerConfig, TaskLearner
from dist_cts.meta_train import meta_train
from dist_cts.progress import Progress
from dist_cts.state import TrainState

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
K = 2


class Source(ResidentSource):
    """A task without content in device memory."""

    def __init__(self, task, device):
        self.manifest = SimpleNamespace(name=str(task), count=64, pixels=8, classes=4, sha256="")
        self.device, self.labels = device, np.arange(64) % 4
        self.images = torch.zeros(64, 8, 8, 3, dtype=torch.uint8, device=device)


class Waits(TorchDispatchMode):
    """Collects the operations between host and device that block the host; reading a value raises by itself."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        kinds = {x.device.type for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)}
        if len(kinds) > 1 and not (kwargs.get("non_blocking") or any(x is True for x in args)):
            self.found.append(str(function))
        return result


class Count(TorchDispatchMode):
    """Counts the ATen operations that compute or copy: a view starts nothing on a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


def fused(self, gradients, *states, **options):
    """The checks that the fused optimizers' CUDA kernels make."""
    for tensors in (gradients, *(state for state in states if isinstance(state, list))):
        for parameter, tensor in zip(self, tensors, strict=False):
            assert (tensor.device, tensor.dtype) == (parameter.device, parameter.dtype)
            assert tensor.shape in (parameter.shape, ())


@pytest.fixture
def fake_gpu(monkeypatch):
    """CUDA tensors are fake; what needs a real device's context is replaced."""

    def zero_gradients(outputs, inputs, *rest, **options):
        return tuple(torch.zeros_like(x) for x in inputs)

    generator = type("Generator", (), {"__init__": lambda *_: None, "manual_seed": lambda *_: None})
    monkeypatch.setattr(torch.cuda, "Event", type("Event", (), {"record": lambda self: None}))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch, "Generator", generator)
    monkeypatch.setattr(torch.autograd, "grad", zero_gradients)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch._C, "_select_conv_backend", lambda *_, **__: torch._C._ConvBackend.Cudnn)
    monkeypatch.setattr(MetaReducer, "_receive", lambda self: None)  # reads a value that has arrived on the host
    with torch.library._scoped_library("aten", "IMPL") as library:
        for name in ("_fused_sgd_", "_fused_adam_"):
            library.impl(name, fused, "Meta", allow_override=True)
        with FakeTensorMode():
            yield


@pytest.fixture
def group(request):
    """A process group of as many ranks as the test's `ranks`, whose collectives return at once."""
    ranks = getattr(request.node, "callspec", SimpleNamespace(params={})).params.get("options", {}).get("ranks", 1)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    yield
    dist.destroy_process_group()


def make_state(device, model="tiny", tasks=1, ranks=1, optimizer="sgd", autocast=None, channels_last=False, batch=8):
    placement, learners = place(tasks, ranks, 0), []
    group = data_group(placement)
    for task in placement.local_tasks:
        with device:
            module = models.MODELS[model].build(4, 1.0)
        for parameter in module.parameters() if channels_last else ():
            if parameter.ndim == 4:  # `Module.to` swaps fake tensors, and fails
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        batches = TaskBatches(
            Source(task, device), 0, batch, DataConfig(), data_ranks=placement.data_ranks, channels_last=channels_last
        )
        inner = InnerConfig(optimizer=optimizer)
        module = convert_sync_batch_norm(module, group)
        learners.append(TaskLearner(str(task), module, "fc", batches, inner, autocast=autocast, data_group=group))
    phi = learners[0].theta.clone()
    return TrainState(phi, learners[0].flat.body_layout, learners, Progress(K)), placement


def train(state, placement, algorithm="cts", reduction="mean", episodes=2, watch=None, method=None, wire="fp32"):
    """Episodes of meta-training from where the state is; the last one inside `watch`."""
    beta = 1.0 if algorithm == "mtl" else 0.1
    method = method or MethodConfig()
    row = make_algorithm(algorithm, method, inner_steps=K, meta_lr=beta, seed=0)
    reducer = MetaReducer(state.phi, state.learners, placement, reduction, wire=wire, delay=method.delay)
    done = state.progress.step // K
    meta_train(state, row, reducer, beta=beta, M=done + episodes - 1, K=K)
    with watch:
        meta_train(state, row, reducer, beta=beta, M=done + episodes, K=K)
    return reducer


def check(state, reducer):
    """Devices, dtypes, shapes and strides of all that stays between two steps."""
    assert state.phi.device == reducer._idle[0].buffer.device == CUDA
    for learner in state.learners:
        tensors = learner.state_dict() | {"loss": learner.loss, "counters": learner.counters}
        assert {tensor.device for tensor in tensors.values()} == {CUDA}
        assert {t.dtype for name, t in tensors.items() if "num_batches_tracked" not in name} == {torch.float32}
        parameters = dict(learner.model.named_parameters())
        gradients = learner.flat.layout.views(learner.flat.grad)
        for slot in learner.flat.layout.slots:
            parameter, gradient = parameters[slot.name], gradients[slot.name]
            assert tuple(parameter.shape) == tuple(gradient.shape) == slot.shape
            assert parameter.stride() == gradient.stride() == slot.stride
            assert parameter.untyped_storage()._cdata == learner.flat.vector.untyped_storage()._cdata


OPTIONS = [
    {"autocast": torch.bfloat16},
    {"channels_last": True},
    {"optimizer": "nesterov"},
    {"optimizer": "adam"},
    {"optimizer": "adam", "autocast": torch.bfloat16, "channels_last": True, "tasks": 2},
    {"ranks": 2},  # a data group
    {"ranks": 2, "autocast": torch.bfloat16, "channels_last": True},
]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_no_algorithm_waits_for_the_gpu(group, fake_gpu, algorithm):
    state, placement = make_state(CUDA)
    waits = Waits()
    check(state, train(state, placement, algorithm, watch=waits))
    assert waits.found == []


@pytest.mark.parametrize("batch", ["last", "next"])
def test_gradients_instead_of_differences_do_not_wait_for_the_gpu(group, fake_gpu, batch):
    state, placement = make_state(CUDA)
    waits = Waits()
    method = MethodConfig(meta_gradient="fomaml", gradient_batch=batch)
    check(state, train(state, placement, "cts", watch=waits, method=method))
    assert waits.found == []


@pytest.mark.parametrize("wire", ["fp32", "bf16"])
@pytest.mark.parametrize("reduction", ["mean", "ordered"])
def test_a_delayed_reduction_does_not_wait_for_the_gpu(group, fake_gpu, reduction, wire):
    state, placement = make_state(CUDA)
    waits = Waits()
    method = MethodConfig(delay=1)
    reducer = train(state, placement, reduction=reduction, watch=waits, method=method, wire=wire)
    check(state, reducer)
    assert len(reducer._idle) == 2
    assert waits.found == []


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_no_option_waits_for_the_gpu_or_changes_what_stays(group, fake_gpu, options):
    state, placement = make_state(CUDA, **options)
    waits = Waits()
    check(state, train(state, placement, watch=waits))
    check(state, train(state, placement, watch=waits, reduction="ordered"))
    assert waits.found == []
    images, labels = state.learners[0].batch
    last = options.get("channels_last", False)
    assert images.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    assert (images.device, images.dtype, labels.dtype) == (CUDA, torch.float32, torch.int64)


def test_a_blocking_copy_is_found(fake_gpu):
    with Waits() as waits:
        torch.zeros(3, device=CUDA).cpu()
        torch.zeros(3).to(CUDA, non_blocking=True)
    assert len(waits.found) == 1
    with pytest.raises(RuntimeError, match="_local_scalar_dense"):
        torch.zeros(3, device=CUDA).sum().item()


@pytest.mark.parametrize("model", ["tiny", "resnet20"])
def test_a_step_takes_at_most_30_operations_more_than_plain_sgd(group, monkeypatch, model):
    monkeypatch.setattr(MetaReducer, "_receive", lambda self: None)  # computes on the host
    state, placement = make_state(CPU, model, batch=2)  # real tensors, for a real backward pass
    ours = Count()
    train(state, placement, watch=ours)
    batches = TaskBatches(Source(0, CPU), 0, 2, DataConfig())
    module = models.MODELS[model].build(4, 1.0)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, fused=True)

    def plain_step():
        images, labels = batches.next()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module(images), labels).backward()
        optimizer.step()

    plain_step()
    with Count() as plain:
        plain_step()
    assert 0 < ours.count / K - plain.count <= 30
