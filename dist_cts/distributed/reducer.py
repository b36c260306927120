"""The all-reduce: one collective per meta-update with the mean meta-gradient and a control tail."""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from dist_cts.distributed.placement import Placement
from dist_cts.errors import RunError
from dist_cts.learner import TaskLearner

Reduction = Literal["mean", "ordered"]
Wire = Literal["fp32", "bf16"]
STEP_MODULUS = 4096  # fp32 sums step numbers below it exactly over up to 4,096 ranks


def collectives(wire: Wire) -> int:
    """How many a reduction runs at the same time."""
    return 1 if wire == "fp32" else 2


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


@dataclass
class _Message:
    """A buffer and the reduction that it is used for."""

    buffer: Tensor
    vectors: Tensor  # [rows, N], the first part of the buffer
    tail: Tensor  # its other part
    sent: Tensor  # the buffer; with wire=bf16, a copy of the vectors, and the tail has a collective of its own
    gathered: Tensor | None  # [W, length of sent], for `ordered`
    step: int = 0
    scale: float | None = None  # None: only the tail is reduced
    works: list[dist.Work | None] = field(default_factory=list)  # None: already complete


class MetaReducer:
    """Mean over T tasks of vectors [N]: one buffer and one collective per meta-update, for any number of tasks, ranks.

    The buffer holds the sum over this rank's learners, then the tail: stop request, step, wait seconds [W], and four
    rows [4, T] of steps, loss, metric and non-finite flags. All ranks thus agree on stopping, NaN and desync at the
    same step, at no extra cost. `ordered` gathers the T vectors and adds them in task order: bit-identical on every
    placement that gives each task one rank, for W times the memory.

    `wire=bf16` sends the vectors rounded to bfloat16, which halves the bytes, and the tail in fp32 by a second
    collective at the same time. Every rank still gets the same bits. `ordered` adds the rounded vectors in fp32; `mean`
    also rounds their sums.

    With a `delay` of d steps, the collective of step k overlaps with the next d steps, and all ranks wait for it after
    step k + d. Every reduction in flight has a buffer of its own.
    """

    def __init__(
        self,
        phi: Tensor,
        learners: list[TaskLearner],
        placement: Placement,
        reduction: Reduction = "mean",
        wait: Callable[[torch.cuda.Event], None] = torch.cuda.Event.synchronize,
        *,
        wire: Wire = "fp32",
        delay: int = 0,
        groups: Sequence[dist.ProcessGroup | None] = (None,),
        reduced: dict[int, Tensor] | None = None,
    ) -> None:
        """`phi` [N] gives length, device and dtype; `learners` are this rank's, in task order.

        `wait` returns when a CUDA event has happened, or raises: a reduction whose peer is gone never ends. `groups`
        take turns. `reduced`: deltas [N] that `drain` has waited for, by the step at which they started.
        """
        tasks, world_size = placement.tasks, placement.world_size
        self.phi, self.numel = phi, phi.numel()
        self.learners, self.placement, self.reduction, self.wait = learners, placement, reduction, wait
        self.wire = {"fp32": torch.float32, "bf16": torch.bfloat16}[wire]
        self.delay, self.groups, self.reduced = delay, deque(groups), {} if reduced is None else reduced
        taken = Counter[int]()
        self.places: list[tuple[int, int]] = []  # of each task, for `ordered`: its first rank and its row there
        for first, *_ in placement.assignment:
            self.places.append((first, taken[first]))
            taken[first] += 1
        self.rows = max(taken.values()) if reduction == "ordered" else 1
        self.message_numel = self.rows * self.numel + 2 + world_size + 4 * tasks
        self._idle, self._in_flight = [self._message()], deque[_Message]()
        self.integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[phi.itemsize]
        self.stop_requested = False
        self._pending: tuple[int, Tensor, torch.cuda.Event | None] | None = None
        self._received: list[Control] = []

    def start(self, gradients: Iterable[Tensor], step: int, scale: float = 1.0) -> None:
        """Starts reducing `scale` times the mean over all T tasks; every rank calls this at the same `step`.

        `gradients` yields one vector [N] per local learner, in order, and may be overwritten. A non-finite one counts
        as zero and sets its task's flag. Overwrites what `finished` has returned.
        """
        message = self._idle.pop() if self._idle else self._message()
        if self.placement.contributes:  # the ranks of a data group hold the same vector: the first contributes it
            for row, (gradient, learner) in enumerate(zip(gradients, self.learners, strict=True)):
                self._add(message.vectors, row, gradient, learner)
        else:
            message.vectors.zero_()
        self._send(message, step, scale)

    def exchange(self, step: int) -> None:
        """Starts reducing only the tail: for algorithms with many steps between two meta-updates."""
        self._send(self._idle.pop() if self._idle else self._message(), step, None)

    def finished(self, step: int, flush: bool = False) -> list[Tensor]:
        """The deltas [N] to apply after `step`, oldest first, bit-identical on every rank; valid until the next start.

        Waits for the reductions started `delay` steps ago or earlier; `flush`: for all of them.
        """
        due = step if flush else step - self.delay
        deltas = [self.reduced.pop(started) for started in sorted(self.reduced) if started <= due]
        while self._in_flight and self._in_flight[0].step <= due:
            delta = self._complete(self._in_flight.popleft())
            deltas += [] if delta is None else [delta]
        return deltas

    def drain(self) -> None:
        """Waits for all reductions in flight and moves their deltas to `reduced`, which a checkpoint saves."""
        while self._in_flight:
            message = self._in_flight.popleft()
            if (delta := self._complete(message)) is not None:
                self.reduced[message.step] = delta.clone()

    def received(self, flush: bool = False) -> list[Control]:
        """The tails of the finished reductions since the last call, oldest first: all but the latest one's.

        Reading one reduction late keeps the GPU busy with the next step; `flush` waits for the latest, too. Every rank
        that calls this at the same step gets the same result.

        Raises:
            RunError: the ranks were not at the same step.
        """
        if flush:
            self._receive()
        received, self._received = self._received, []
        return received

    def _message(self) -> _Message:
        buffer, size = self.phi.new_zeros(self.message_numel), self.rows * self.numel
        vectors, tail = buffer[:size].view(self.rows, self.numel), buffer[size:]
        sent = buffer if self.wire == torch.float32 else buffer.new_zeros(size, dtype=self.wire)
        ordered = self.reduction == "ordered"
        gathered = sent.new_empty(self.placement.world_size, len(sent)) if ordered else None
        return _Message(buffer, vectors, tail, sent, gathered)

    def _add(self, vectors: Tensor, row: int, gradient: Tensor, learner: TaskLearner) -> None:
        # Inf or NaN anywhere makes the sum Inf or NaN, and its difference with itself NaN; the host reads no value.
        total = gradient.sum()
        finite = total - total == 0
        learner.flag_nonfinite(~finite)
        # As integers, NaN times 0 is 0, and times 1 keeps all bits; on a CPU this takes half the time of `where`.
        if self.reduction == "ordered" or row == 0:
            torch.mul(gradient.view(self.integer), finite, out=vectors[row].view(self.integer))
        else:
            gradient.view(self.integer).mul_(finite)
            vectors[0] += gradient

    def _pack(self, tail: Tensor, step: int) -> None:
        placement = self.placement
        header = [float(self.stop_requested), float(step % STEP_MODULUS), *[0.0] * placement.world_size]
        header[2 + placement.rank] = sum(learner.take_wait_seconds() for learner in self.learners)
        # One copy from pinned memory: assigning Python numbers to elements would make the host wait for the GPU.
        host = torch.tensor(header, dtype=tail.dtype)
        tail[: len(header)].copy_(host.pin_memory() if tail.is_cuda else host, non_blocking=True)
        rows = tail[len(header) :].zero_().view(4, placement.tasks)
        for task, learner in zip(placement.local_tasks, self.learners, strict=True):
            # The D ranks of a data group see D slices of one batch: their means count 1 / D each.
            torch.div(learner.take_counters(), placement.data_ranks, out=rows[:, task])

    def _send(self, message: _Message, step: int, scale: float | None) -> None:
        self._pack(message.tail, step)
        message.step, message.scale = step, scale
        self.groups.rotate(-1)  # the same group on every rank
        group, late, apart = self.groups[0], self.delay > 0, message.sent is not message.buffer
        message.works = []
        if scale is None or apart:
            message.works.append(dist.all_reduce(message.tail, group=group, async_op=late or scale is not None))
        if scale is not None:
            if apart:
                message.sent.copy_(message.vectors.view(-1))
            if message.gathered is None:
                work = dist.all_reduce(message.sent, group=group, async_op=late)
            else:
                gathered = message.gathered.view(-1)
                work = dist.all_gather_into_tensor(gathered, message.sent, group=group, async_op=late)
            message.works.append(work)
        self._in_flight.append(message)

    def _complete(self, message: _Message) -> Tensor | None:
        """Waits for a reduction, on a GPU in the current stream and not on the host; its delta [N], if it has one."""
        for work in message.works:
            if work is not None:
                work.wait()
        self._idle.append(message)
        total, tail, apart = message.vectors[0], message.tail, message.sent is not message.buffer
        if message.scale is not None and message.gathered is not None:
            if not apart:
                tail = message.gathered[:, self.rows * self.numel :].sum(0)
            total.zero_()
            for rank, row in self.places:
                total += message.gathered[rank, row * self.numel : (row + 1) * self.numel]
        elif message.scale is not None and apart:
            total.copy_(message.sent)
        self._read(tail, message.step)
        return None if message.scale is None else total.mul_(message.scale / self.placement.tasks)

    def _read(self, tail: Tensor, step: int) -> None:
        """Copies a reduced tail to the host; the copy is read one reduction later."""
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
