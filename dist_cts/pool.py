"""Pools: more tasks than learners. A learner takes another task of its share at every episode; the others rest.

The T tasks are divided into N shares of neighbours, one per learner. A learner takes its tasks in random order, each
once before any returns. So the draw does not depend on the number of ranks, every rank has its part of each episode,
and what a task keeps between its episodes stays on the rank of its learner.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dist_cts.flat import Parts
from dist_cts.learner import Batch, Batches, TaskLearner
from dist_cts.optimizer import InnerConfig
from dist_cts.seeds import hashed_seed


def share(tasks: int, learners: int, learner: int) -> range:
    """The tasks, of 0 .. T - 1, that one of N learners draws from: T / N neighbours."""
    return range(learner * tasks // learners, (learner + 1) * tasks // learners)


def draw(count: int, seed: int, learner: int, m: int) -> int:
    """The task of a learner in episode m, counted from 0, by its position in the learner's share of `count`."""
    cycle, position = divmod(m, count)
    return int(np.random.default_rng(hashed_seed(seed, "pool", learner, cycle)).permutation(count)[position])


class PoolBatches:
    """The batches of the task that is drawn for each episode of K steps; only its data are open.

    `members` open the batches of each task of the share, whose data `fingerprints` identify.
    """

    def __init__(
        self, members: Sequence[Callable[[], Batches]], fingerprints: Sequence[str], seed: int, learner: int, K: int
    ) -> None:
        self.members, self.seed, self.learner, self.K = members, seed, learner, K
        self.fingerprint = hashlib.sha256("\n".join(fingerprints).encode()).hexdigest()
        self.step, self.wait_seconds = 0, 0.0
        self._opened: tuple[int, Batches] | None = None

    def task_at(self, step: int) -> int:
        """The task of global step `step`, by its position in the share."""
        return draw(len(self.members), self.seed, self.learner, step // self.K)

    def next(self) -> Batch:
        """Inputs and targets of the next step."""
        task = self.task_at(self.step)
        if self._opened is None or self._opened[0] != task:
            started = time.perf_counter()
            self.close()
            self._opened = task, self.members[task]()
            self._opened[1].seek(self.step)
            self.wait_seconds += time.perf_counter() - started
        batches = self._opened[1]
        batch = batches.next()
        self.wait_seconds += batches.wait_seconds
        batches.wait_seconds = 0.0
        self.step += 1
        return batch

    def seek(self, step: int) -> None:
        """Makes global step `step` the next one."""
        self.step = step
        if self._opened is not None and self._opened[0] == self.task_at(step):
            self._opened[1].seek(step)

    def close(self) -> None:
        """Closes the data of the current task."""
        if self._opened is not None and hasattr(self._opened[1], "close"):
            self._opened[1].close()
        self._opened = None


class PoolLearner(TaskLearner):
    """The learner of the task that its PoolBatches draw; what the other tasks keep rests in host memory.

    A task rests as its private parameters, optimizer state and buffers; theta does not, as every episode starts at phi.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        parts: Parts | str | None,
        batches: PoolBatches,
        inner: InnerConfig,
        *,
        start: Callable[[int], Tensor],
        **options: Any,
    ) -> None:
        """`start` gives the private parameters [H] with which a task of the share starts."""
        super().__init__(name, model, parts, batches, inner, **options)
        self.start = start
        self.task: int | None = None  # None before the first episode
        self.resting: dict[int, dict[str, Tensor]] = {}
        self._buffers = {key: buffer.clone() for key, buffer in model.named_buffers()}

    def reset(self, phi: Tensor) -> None:
        """Takes the task of the episode that begins, then as TaskLearner does."""
        task = self.batches.task_at(self.step)
        if task != self.task:
            if self.task is not None and not self._forgets:
                own = super().state_dict()
                own["parameters"] = own["parameters"][len(self.theta) :]
                kept = {key: value for key, value in own.items() if not key.startswith("memory.")}
                self.resting[self.task] = {key: value.to("cpu", copy=True) for key, value in kept.items()}
            self._take(task)
        super().reset(phi)

    def state_dict(self) -> dict[str, Tensor]:
        """As TaskLearner, with the states of the tasks that rest, and which task is not resting."""
        state = super().state_dict()
        if self.task is None:
            return state
        resting = {f"resting.{task}.{key}": value for task, kept in self.resting.items() for key, value in kept.items()}
        return state | resting | {"task": torch.tensor(self.task)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores a `state_dict`."""
        super().load_state_dict(state)
        self.resting = {}
        for key, value in state.items():
            if key.startswith("resting."):
                _, task, name = key.split(".", 2)
                self.resting.setdefault(int(task), {})[name] = value.to("cpu", copy=True)
        self.task = int(state["task"]) if "task" in state else None
        if self.task is not None:
            self.flat.start_private(self.start(self.task))

    @property
    def _forgets(self) -> bool:
        """Whether every episode starts without anything that a task could keep."""
        return self.reset_config.head and self.reset_config.optimizer and self.reset_config.statistics

    def _take(self, task: int) -> None:
        """Private parameters, optimizer state and buffers <- those of the task, from its rest or as it starts."""
        self.task = task
        self.flat.start_private(self.start(task))
        self.flat.reset_private()
        self._clear_optimizer()
        kept = self.resting.pop(task, {})
        if "parameters" in kept:
            self.flat.vector[len(self.theta) :].copy_(kept["parameters"])
        for key, value in self.optimizer.state[self.parameter].items():
            if f"optimizer.{key}" in kept:
                value.copy_(kept[f"optimizer.{key}"])
        for key, buffer in self.model.named_buffers():
            buffer.copy_(kept.get(f"buffers.{key}", self._buffers[key]))
