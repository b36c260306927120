"""The all-reduce: one collective per meta-update with the mean meta-gradient and a control tail."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from dist_cts.distributed.placement import Placement
from dist_cts.errors import RunError
from dist_cts.learner import TaskLearner

Reduction = Literal["mean", "ordered"]
STEP_MODULUS = 4096  # fp32 sums step numbers below it exactly over up to 4,096 ranks


@dataclass(frozen=True)
class Control:
    """What the ranks told each other in one reduction; the same on every rank.

    `steps`, `loss`, `metric` [T]: per task, inner steps since the previous reduction and the means over them.
    `wait_seconds` [W]: per rank, time spent waiting for data. `nonfinite`: indices of the tasks excluded from the mean.
    """

    step: int
    stop: bool
    steps: Tensor
    loss: Tensor
    metric: Tensor
    wait_seconds: Tensor
    nonfinite: list[int]


class MetaReducer:
    """Mean over T tasks of vectors [N]: one buffer and one collective per call, for any number of tasks and ranks.

    The buffer holds the sum over this rank's learners, then the tail: stop request, step, wait seconds [W], and four
    rows [4, T] of steps, loss, metric and non-finite flags. All ranks thus agree on stopping, NaN and desync at the
    same step, at no extra cost. `ordered` gathers the T vectors and adds them in task order: bit-identical on every
    placement that gives each task one rank, for W times the memory.
    """

    def __init__(
        self,
        phi: Tensor,
        learners: list[TaskLearner],
        placement: Placement,
        reduction: Reduction = "mean",
        wait: Callable[[torch.cuda.Event], None] = torch.cuda.Event.synchronize,
    ) -> None:
        """`phi` [N] gives length, device and dtype; `learners` are this rank's, in task order.

        `wait` returns when a CUDA event has happened, or raises: a reduction whose peer is gone never ends.
        """
        tasks, world_size = placement.tasks, placement.world_size
        self.numel = numel = phi.numel()
        self.learners, self.placement, self.reduction, self.wait = learners, placement, reduction, wait
        taken = Counter[int]()
        self.places: list[tuple[int, int]] = []  # of each task, for `ordered`: its first rank and its row there
        for first, *_ in placement.assignment:
            self.places.append((first, taken[first]))
            taken[first] += 1
        self.rows = max(taken.values()) if reduction == "ordered" else 1
        self.buffer = phi.new_zeros(self.rows * numel + 2 + world_size + 4 * tasks)
        self.vectors = self.buffer[: self.rows * numel].view(self.rows, numel)
        self.tail = self.buffer[self.rows * numel :]
        self.integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[phi.itemsize]
        self.stop_requested = False
        self._pending: tuple[int, Tensor, torch.cuda.Event | None] | None = None
        self._received: list[Control] = []

    def mean(self, gradients: Iterable[Tensor], step: int, scale: float = 1.0) -> Tensor:
        """`scale` times the mean over all T tasks [N], bit-identical on every rank; valid until the next call.

        `gradients` yields one vector [N] per local learner, in order, and may be overwritten. A non-finite one counts
        as zero and sets its task's flag. Every rank calls this at the same `step`.
        """
        if self.placement.contributes:  # the ranks of a data group hold the same vector: the first contributes it
            for row, (gradient, learner) in enumerate(zip(gradients, self.learners, strict=True)):
                self._add(row, gradient, learner)
        else:
            self.vectors.zero_()
        self._pack(step)
        if self.reduction == "mean":
            dist.all_reduce(self.buffer)
            self._send(self.tail, step)
            return self.vectors[0].mul_(scale / self.placement.tasks)
        gathered = self.buffer.new_empty(self.placement.world_size, self.buffer.numel())
        dist.all_gather_into_tensor(gathered.view(-1), self.buffer)
        self._send(gathered[:, self.rows * self.numel :].sum(0), step)
        total = self.vectors[0].zero_()
        for rank, row in self.places:
            total += gathered[rank, row * self.numel : (row + 1) * self.numel]
        return total.mul_(scale / self.placement.tasks)

    def exchange(self, step: int) -> None:
        """Reduces only the tail: for algorithms with many steps between two meta-updates."""
        self._pack(step)
        dist.all_reduce(self.tail)
        self._send(self.tail, step)

    def received(self, flush: bool = False) -> list[Control]:
        """The tails that have arrived since the last call, oldest first: all but the latest reduction's.

        Reading one reduction late keeps the GPU busy with the next step; `flush` waits for the latest, too. Every rank
        that calls this at the same step gets the same result.

        Raises:
            RunError: the ranks were not at the same step.
        """
        if flush:
            self._receive()
        received, self._received = self._received, []
        return received

    def _add(self, row: int, gradient: Tensor, learner: TaskLearner) -> None:
        # Inf or NaN anywhere makes the sum Inf or NaN, and its difference with itself NaN; the host reads no value.
        total = gradient.sum()
        finite = total - total == 0
        learner.flag_nonfinite(~finite)
        # As integers, NaN times 0 is 0, and times 1 keeps all bits; on a CPU this takes half the time of `where`.
        if self.reduction == "ordered" or row == 0:
            torch.mul(gradient.view(self.integer), finite, out=self.vectors[row].view(self.integer))
        else:
            gradient.view(self.integer).mul_(finite)
            self.vectors[0] += gradient

    def _pack(self, step: int) -> None:
        placement, tail = self.placement, self.tail
        header = [float(self.stop_requested), float(step % STEP_MODULUS), *[0.0] * placement.world_size]
        header[2 + placement.rank] = sum(learner.take_wait_seconds() for learner in self.learners)
        # One copy from pinned memory: assigning Python numbers to elements would make the host wait for the GPU.
        host = torch.tensor(header, dtype=tail.dtype)
        tail[: len(header)].copy_(host.pin_memory() if tail.is_cuda else host, non_blocking=True)
        rows = tail[len(header) :].zero_().view(4, placement.tasks)
        for task, learner in zip(placement.local_tasks, self.learners, strict=True):
            # The D ranks of a data group see D slices of one batch: their means count 1 / D each.
            torch.div(learner.take_counters(), placement.data_ranks, out=rows[:, task])

    def _send(self, tail: Tensor, step: int) -> None:
        event = None
        if tail.is_cuda:
            host = torch.empty(tail.shape, dtype=tail.dtype, pin_memory=True)
            host.copy_(tail, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        else:
            host = tail.clone()
        self._receive()  # the previous tail; waits only if the host is more than a step ahead of the GPU
        self._pending = (step, host, event)

    def _receive(self) -> None:
        if self._pending is None:
            return
        step, tail, event = self._pending
        self._pending = None
        if event is not None:
            self.wait(event)
        tasks, world_size = self.placement.tasks, self.placement.world_size
        if tail[1] != world_size * (step % STEP_MODULUS):
            raise RunError(f"the ranks are out of sync at step {step}; restart the run from its latest checkpoint")
        steps, loss, metric, flags = tail[2 + world_size :].view(4, tasks)
        self._received.append(
            Control(
                step=step,
                stop=bool(tail[0] > 0),
                steps=steps,
                loss=loss / steps,
                metric=metric / steps,
                wait_seconds=tail[2 : 2 + world_size],
                nonfinite=flags.nonzero().flatten().tolist(),
            )
        )
