"""Inner steps as CUDA graphs: one launch per learner and step instead of hundreds. Not yet measured on a GPU.

The graph holds forward, backward, update and counters; each batch is copied into the same input tensors. Reset, shift,
restart, checkpoint and evaluation work in place on the learner's own memory between replays: they, and NCCL, need no
capture.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from dist_cts.algorithms.table import Algorithm
from dist_cts.distributed.placement import Placement
from dist_cts.learner import Batch, TaskLearner

WARM_UP = 3  # eager steps before the capture: they create the momentum and let libraries choose kernels and workspaces

# Captures some work without running it; returns its replay.
Record = Callable[[Callable[[], None]], Callable[[], object]]


def record_cuda_graph(work: Callable[[], None]) -> Callable[[], object]:
    """Captures `work` on the current stream; loader threads may use CUDA meanwhile."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
        work()
    return graph.replay


class StepGraph:
    """A learner's inner steps: the first ones eager, the others by replaying one graph.

    `load_state_dict` replaces the optimizer state, which the graph would miss: the learner then warms up and is
    recorded again. The learning rate is part of the graph.
    """

    def __init__(self, learner: TaskLearner, record: Record = record_cuda_graph) -> None:
        self.learner, self.record = learner, record
        self.taken = 0
        self.inputs: Batch | None = None
        self.replay: Callable[[], object] | None = None
        self.states: list[Tensor | None] = []  # of the optimizer; held, so that no other tensor gets their ids

    def step(self) -> None:
        """One inner step on the learner's next batch."""
        batch = self.learner.next_batch()
        if [*map(id, self._optimizer_states())] != [*map(id, self.states)]:
            self.taken, self.replay = 0, None
        if self.taken < WARM_UP:
            self.taken += 1
            self.learner.step_on(batch)
            self.states = self._optimizer_states()
            return
        if self.replay is None:
            self.inputs = tree_map(Tensor.clone, batch)
            self.replay = self.record(partial(self.learner.step_on, self.inputs))
        for static, tensor in zip(tree_leaves(self.inputs), tree_leaves(batch), strict=True):
            static.copy_(tensor)
        self.replay()

    def _optimizer_states(self) -> list[Tensor | None]:
        return list(self.learner.optimizer.state[self.learner.parameter].values())


def use_graphs(learners: Sequence[TaskLearner]) -> None:
    """Makes `inner_step` of each learner replay a CUDA graph, all learners side by side on streams of their own.

    Every step then takes all learners in this order: the first one forks the streams, the last one joins them.
    """
    main, streams = torch.cuda.current_stream(), [torch.cuda.Stream() for _ in learners]

    def step(index: int, graph: StepGraph) -> None:
        if index == 0:  # every stream starts from what the main stream has done so far
            for stream in streams:
                stream.wait_stream(main)
        with torch.cuda.stream(streams[index]):
            graph.step()
        if index == len(streams) - 1:
            for stream in streams:
                main.wait_stream(stream)

    for index, learner in enumerate(learners):
        learner.graphed_step = partial(step, index, StepGraph(learner))


def check_graphs(algorithm: Algorithm, placement: Placement, device: torch.device) -> None:
    """Raises ValueError, the same on every rank, where inner steps cannot be CUDA graphs."""
    if algorithm.observe is not None or algorithm.replays:
        why = "replays episodes" if algorithm.replays else "looks into every inner step"
        raise ValueError(f"step=graph: this algorithm {why}; set step=eager")
    if any(len(ranks) > 1 for ranks in placement.assignment):
        raise ValueError("step=graph: ranks that share a task communicate within a step; set step=eager")
    if device.type != "cuda":
        raise ValueError(f"step=graph needs a GPU, the device is {device}; set step=eager")
