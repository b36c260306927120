"""step=graph on a CPU: a recorder in place of CUDA graphs replays the operations of a step into the same memory."""

import copy
from contextlib import nullcontext
from itertools import count

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_cts import models
from dist_cts.algorithms.table import ALGORITHMS
from dist_cts.distributed.placement import Placement, place
from dist_cts.distributed.process_group import process_group
from dist_cts.distributed.reducer import MetaReducer
from dist_cts.learner import InnerConfig, ResetConfig, TaskLearner
from dist_cts.meta_train import meta_train
from dist_cts.models import ModelConfig
from dist_cts.progress import Progress
from dist_cts.state import TrainState
from dist_cts.step_graph import WARM_UP, StepGraph, check_graphs, use_graphs
from tests.helpers.batches import MemoryBatches

M, K, TASKS = 3, 5, 2
GRAPHABLE = [name for name, row in ALGORITHMS.items() if row.observe is None and not row.replays]


class Tape(TorchDispatchMode):
    """Keeps every ATen operation with its very tensors, as a CUDA graph keeps their addresses."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, result))
        return result

    def replay(self):
        for function, args, kwargs, result in self.operations:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def recorder(learner, tapes):
    """As a capture does, it leaves no trace of its one run in the learner's memory."""

    def record(work):
        memory = [*learner.state_dict().values(), learner.flat.grad, learner.counters]
        before = [tensor.clone() for tensor in memory]
        tape = Tape()
        with torch.no_grad(), tape:
            work()
        for tensor, value in zip(memory, before, strict=True):
            tensor.copy_(value)
        tapes.append(tape)
        return torch.no_grad()(tape.replay)

    return record


def start(inner, reset=None):
    learners = []
    for task in range(TASKS):
        model, head = models.build(ModelConfig(name="tiny"), 3 + task, "head", task)
        batches = MemoryBatches(task, classes=3 + task)
        learners.append(TaskLearner(f"task {task}", model, head, batches, inner, reset=reset))
    return TrainState(learners[0].theta.clone(), learners[0].flat.body_layout, learners, Progress(K))


def train(state, algorithm, graphs, *, restart_at=None, evaluate_at=None):
    tapes = []
    if graphs:
        for learner in state.learners:
            learner.graphed_step = StepGraph(learner, recorder(learner, tapes)).step

    def after_step():
        step = state.progress.step
        if step == restart_at:
            state.learners[0].restart(state.phi)
        if step == evaluate_at:
            seen.append([learner.evaluate([learner.batches.batch_at(99)]) for learner in state.learners])
        snapshots.append(state.phi.clone())

    seen, snapshots = [], []
    reducer = MetaReducer(state.phi, state.learners, place(TASKS, 1, 0))
    meta_train(state, ALGORITHMS[algorithm], reducer, beta=0.5, M=M, K=K, after_step=after_step)
    return tapes, seen, torch.stack(snapshots)


def tensors(state):
    return {
        "phi": state.phi,
        **{f"{learner.name}.{key}": value for learner in state.learners for key, value in learner.state_dict().items()},
        **{f"{learner.name}.counters": learner.counters for learner in state.learners},
    }


@pytest.fixture
def alone():
    with process_group(torch.device("cpu"), 60):
        yield


@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adam"])
@pytest.mark.parametrize("algorithm", GRAPHABLE)
def test_replayed_steps_have_the_bits_of_eager_ones(alone, algorithm, optimizer):
    """Over episodes that reset the learners, with an evaluation, a restart and snapshots between replays."""
    inner, reset = InnerConfig(optimizer=optimizer, lr=0.05), ResetConfig(head=True, optimizer=True, statistics=True)
    eager, graphed = start(inner, reset), start(inner, reset)
    _, expected_seen, expected_snapshots = train(eager, algorithm, False, restart_at=8, evaluate_at=7)
    tapes, seen, snapshots = train(graphed, algorithm, True, restart_at=8, evaluate_at=7)
    assert len(tapes) == TASKS
    assert seen == expected_seen
    assert torch.equal(snapshots, expected_snapshots)
    expected = tensors(eager)
    for name, tensor in tensors(graphed).items():
        assert torch.equal(tensor, expected[name]), name


def test_a_checkpoint_between_replays_resumes_with_the_bits_of_eager_steps(alone):
    inner = InnerConfig(lr=0.05)
    eager, graphed = start(inner), start(inner)
    train(eager, "cts", False)
    graphed.progress.stopping = False

    def stop(state=graphed):
        state.progress.stopping = state.progress.step == 8

    for learner in graphed.learners:
        learner.graphed_step = StepGraph(learner, recorder(learner, [])).step
    reducer = MetaReducer(graphed.phi, graphed.learners, place(TASKS, 1, 0))
    meta_train(graphed, ALGORITHMS["cts"], reducer, beta=0.5, M=M, K=K, after_step=stop)
    resumed = start(inner)
    resumed.phi.copy_(graphed.phi)
    resumed.progress.step = graphed.progress.step
    for learner, saved in zip(resumed.learners, graphed.learners, strict=True):
        learner.load_state_dict(copy.deepcopy(saved.state_dict()))
        learner.batches.seek(8)
    train(resumed, "cts", True)
    for name, tensor in tensors(resumed).items():
        if "counters" not in name:
            assert torch.equal(tensor, tensors(eager)[name]), name


def test_the_inputs_stay_where_they_are_and_the_first_steps_are_eager(alone):
    state, learner = start(InnerConfig()), None
    learner = state.learners[0]
    graph = StepGraph(learner, recorder(learner, tapes := []))
    for _ in range(WARM_UP):
        graph.step()
    assert tapes == []
    graph.step()
    places = [tensor.data_ptr() for tensor in graph.inputs]
    graph.step()
    assert [tensor.data_ptr() for tensor in graph.inputs] == places
    assert len(tapes) == 1
    assert all(torch.equal(a, b) for a, b in zip(learner.batch, learner.batches.batch_at(WARM_UP + 1), strict=True))


class Named(torch.nn.Module):
    """A model whose inputs are a dict."""

    def __init__(self):
        super().__init__()
        self.body, self.fc = torch.nn.Linear(5, 8), torch.nn.Linear(8, 3)

    def forward(self, inputs):
        return self.fc(torch.relu(self.body(torch.cat([inputs["x"], inputs["more"][0]], 1))))


class NamedBatches(MemoryBatches):
    def batch_at(self, step):
        x, y = torch.randn(4, 5, generator=torch.Generator().manual_seed(step)), torch.arange(4) % 3
        return {"x": x[:, :2], "more": (x[:, 2:],)}, y


def test_inputs_may_be_a_dict_with_tuples():
    torch.manual_seed(0)
    eager = TaskLearner("named", Named(), "fc", NamedBatches(0), InnerConfig(lr=0.05))
    graphed = TaskLearner("named", copy.deepcopy(eager.model), "fc", NamedBatches(0), InnerConfig(lr=0.05))
    graphed.graphed_step = StepGraph(graphed, recorder(graphed, tapes := [])).step
    with torch.no_grad():
        for learner in (eager, graphed):
            for _ in range(WARM_UP + 4):
                learner.inner_step()
    assert len(tapes) == 1
    assert torch.equal(graphed.flat.vector, eager.flat.vector)
    assert graphed.evaluate([graphed.batches.batch_at(99)]) == eager.evaluate([eager.batches.batch_at(99)])


@pytest.mark.parametrize(
    ("algorithm", "assignment", "device", "message"),
    [
        ("leap", ((0,), (0,)), "cuda", "looks into every inner step; set step=eager"),
        ("accurate", ((0,), (0,)), "cuda", "replays episodes"),
        ("cts", ((0, 1), (2, 3)), "cuda", "ranks that share a task"),
        ("cts", ((0,), (0,)), "cpu", "needs a GPU, the device is cpu"),
    ],
)
def test_what_cannot_be_a_graph_is_refused_with_the_reason(algorithm, assignment, device, message):
    with pytest.raises(ValueError, match=message):
        check_graphs(ALGORITHMS[algorithm], Placement(assignment, 4, 0), torch.device(device))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_state_that_is_loaded_between_replays_is_recorded_again(optimizer):
    inner = InnerConfig(optimizer=optimizer, lr=0.05)
    eager, graphed = start(inner).learners[0], start(inner).learners[0]
    graphed.graphed_step = StepGraph(graphed, recorder(graphed, tapes := [])).step
    for learner in (eager, graphed):
        with torch.no_grad():
            for _ in range(2):
                for _ in range(WARM_UP + 4):
                    learner.inner_step()
                learner.load_state_dict(copy.deepcopy(learner.state_dict()))
    assert len(tapes) == 2
    for name, tensor in graphed.state_dict().items():
        assert torch.equal(tensor, eager.state_dict()[name]), name


class Stream:
    """Notes for whom it waits."""

    def __init__(self, name, waits):
        self.name, self.waits = name, waits

    def wait_stream(self, other):
        self.waits.append((self.name, other.name))


def test_the_learners_streams_fork_from_the_main_stream_and_join_it(monkeypatch):
    events, numbers = [], count(1)
    main = Stream("main", events)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: Stream(next(numbers), events))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext(events.append(stream.name)))
    learners = start(InnerConfig()).learners
    use_graphs(learners)
    with torch.no_grad():
        for learner in learners:
            learner.inner_step()
    assert events == [(1, "main"), (2, "main"), 1, 2, ("main", 1), ("main", 2)]
