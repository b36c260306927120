"""The one collective of a meta-step: mean meta-gradient over tasks, with a control tail behind it."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from dist_cts.distributed.placement import Placement
from dist_cts.errors import RunError
from dist_cts.learner import TaskLearner

Reduction = Literal["mean", "ordered"]
STEP_MODULUS = 4096  # a sum over 1,024 ranks of steps below it is exact in fp32


@dataclass(frozen=True)
class Control:
    """What the ranks told each other with one reduction; equal on every rank.

    `steps`, `loss`, `accuracy`: per task [T], inner steps since the last reduction and the means over them.
    `wait_seconds`: per rank [W], time that it waited for its data. `nonfinite`: indices of tasks left out.
    """

    step: int
    stop: bool
    steps: Tensor
    loss: Tensor
    accuracy: Tensor
    wait_seconds: Tensor
    nonfinite: list[int]


class MetaReducer:
    """Mean over T tasks of vectors [N], one buffer and one collective a call, whatever the layout of the ranks.

    The buffer is the sum over this rank's learners and, behind it, the tail: stop request, step, wait seconds [W] and
    four rows [4, T] of steps, loss, accuracy and non-finite flags. So stopping, NaN and desync are agreed on at the
    same step everywhere at no extra cost. `ordered` gathers the T vectors and adds them in task order: the same bits
    on any placement that gives each task one rank, for W times the memory.
    """

    def __init__(
        self, phi: Tensor, learners: list[TaskLearner], placement: Placement, reduction: Reduction = "mean"
    ) -> None:
        """`phi` [N] gives the length, device and dtype; `learners` are this rank's, in task order."""
        tasks, world_size = placement.tasks, placement.world_size
        self.numel = numel = phi.numel()
        self.learners, self.placement, self.reduction = learners, placement, reduction
        taken = Counter[int]()
        self.places: list[tuple[int, int]] = []  # of each task, with `ordered`: its first rank, and the row there
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
        """`scale` times the mean over all T tasks [N], the same bits on every rank; valid until the next call.

        `gradients` yields one vector [N] for each local learner, in order, which this may overwrite. A non-finite one
        counts as zero and raises its task's flag. Every rank calls this at the same `step`.
        """
        if self.placement.contributes:  # of a data group, whose ranks hold the same bits, the first
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
        """Reduces the tail alone: for algorithms that let many steps pass between two meta-updates."""
        self._pack(step)
        dist.all_reduce(self.tail)
        self._send(self.tail, step)

    def received(self, flush: bool = False) -> list[Control]:
        """The tails that have arrived since the last call, oldest first: all but the newest reduction's.

        Reading one reduction late lets a GPU work on the next step meanwhile; `flush` waits for the newest too. Every
        rank that asks at the same step gets the same answer.

        Raises:
            RunError: the ranks were not at the same step.
        """
        if flush:
            self._receive()
        received, self._received = self._received, []
        return received

    def _add(self, row: int, gradient: Tensor, learner: TaskLearner) -> None:
        # The sum is finite unless an element is not; no value comes back to the host.
        finite = torch.isfinite(gradient.sum())
        learner.flag_nonfinite(~finite)
        # As integers, NaN times 0 is 0, and 1 keeps all bits; on a CPU in half the time of `where`.
        if self.reduction == "ordered" or row == 0:
            torch.mul(gradient.view(self.integer), finite, out=self.vectors[row].view(self.integer))
        else:
            gradient.view(self.integer).mul_(finite)
            self.vectors[0] += gradient

    def _pack(self, step: int) -> None:
        placement, tail = self.placement, self.tail
        tail.zero_()
        tail[0], tail[1] = float(self.stop_requested), step % STEP_MODULUS
        tail[2 + placement.rank] = sum(learner.take_wait_seconds() for learner in self.learners)
        rows = tail[2 + placement.world_size :].view(4, placement.tasks)
        for task, learner in zip(placement.local_tasks, self.learners, strict=True):
            # D data ranks see D slices of one batch: their means count 1 / D each.
            torch.div(learner.take_statistics(), placement.data_ranks, out=rows[:, task])

    def _send(self, tail: Tensor, step: int) -> None:
        event = None
        if tail.is_cuda:
            host = torch.empty(tail.shape, dtype=tail.dtype, pin_memory=True)
            host.copy_(tail, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        else:
            host = tail.clone()
        self._receive()  # the tail before this one, which has long arrived
        self._pending = (step, host, event)

    def _receive(self) -> None:
        if self._pending is None:
            return
        step, tail, event = self._pending
        self._pending = None
        if event is not None:
            event.synchronize()
        tasks, world_size = self.placement.tasks, self.placement.world_size
        if tail[1] != world_size * (step % STEP_MODULUS):
            raise RunError(f"the ranks left lock-step at step {step}: restart the run from its checkpoint")
        steps, loss, accuracy, flags = tail[2 + world_size :].view(4, tasks)
        self._received.append(
            Control(
                step=step,
                stop=bool(tail[0] > 0),
                steps=steps,
                loss=loss / steps,
                accuracy=accuracy / steps,
                wait_seconds=tail[2 : 2 + world_size],
                nonfinite=flags.nonzero().flatten().tolist(),
            )
        )
