"""A task learner: body, head, batches, inner optimizer and schedule, and what each episode resets."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dist_cts.config import Config
from dist_cts.flat import FlatParams, Parts
from dist_cts.losses import CROSS_ENTROPY, Loss
from dist_cts.optimizer import InnerConfig, make_optimizer, update

Batch = tuple[Any, Tensor]  # inputs: a tensor, or a tuple or dict of tensors, the model's argument; and targets
# Sees a learner between gradient and update, when theta_(k-1), its `loss` and its `flat.grad` belong together.
Observe = Callable[["TaskLearner"], None]
# A block for the forward pass of a step on a number of examples: seeds what the model draws (models/masks.py).
Masks = Callable[[int, int], AbstractContextManager[None]]


class ResetConfig(Config):
    """What is reset together with theta at the start of an episode; the paper resets none of it (supplement C.2)."""

    head: bool = Field(False, description="reset head and private parameters to their start at every episode")
    optimizer: bool = Field(False, description="clear the optimizer state at every episode")
    statistics: bool = Field(False, description="clear batch-norm running statistics at every episode")


class Batches(Protocol):
    """The batches a learner consumes, one per inner step, and the seconds that the host has waited for them."""

    wait_seconds: float

    def next(self) -> Batch:
        """Inputs and targets of the next step."""

    def seek(self, step: int) -> None:
        """Makes global step `step` the next one."""


class TaskLearner:
    """theta of one task, with everything that its inner optimization keeps between steps.

    `theta` [N] is the body, the first part of the flat vector that also holds the head. The ranks of a data group each
    consume a slice of one batch and average the gradient, so their theta are bit-identical.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        parts: Parts | str | None,
        batches: Batches,
        inner: InnerConfig,
        *,
        reset: ResetConfig | None = None,
        schedule: Callable[[int], float] | None = None,
        criterion: Loss = CROSS_ENTROPY,
        autocast: torch.dtype | None = None,
        data_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.name, self.model, self.batches = name, model, batches
        self.inner, self.criterion, self.autocast, self.data_group = inner, criterion, autocast, data_group
        self.reset_config = reset or ResetConfig()
        self.flat = FlatParams(model, parts)
        self.parameter = nn.Parameter(self.flat.vector)
        self.parameter.grad = self.flat.grad
        self.optimizer = make_optimizer([self.parameter], inner)
        self.schedule, self.step, self.batch_step = schedule, 0, 0
        # What an algorithm accumulates over an episode, by name: empty after `reset`, part of the checkpoint.
        self.memory: dict[str, Tensor] = {}
        self.loss = torch.zeros((), device=self.theta.device)  # of the latest inner step, before its update
        self.batch: Batch | None = None  # of the latest inner step, `batch_step`
        self._peeked: Batch | None = None
        self.masks: Masks = lambda step, examples: nullcontext()
        # Inner steps, loss, metric and non-finite updates, summed on the device since the last reduction.
        self.counters = torch.zeros(4, device=self.theta.device)
        self._one = torch.ones((), device=self.theta.device)
        self.graphed_step: Callable[[], None] | None = None  # set by step_graph.py

    @property
    def theta(self) -> Tensor:
        """theta^(t) [N]; the model's parameters are views of it."""
        return self.flat.body

    def reset(self, phi: Tensor) -> None:
        """theta <- phi [N]; head, optimizer state and running statistics stay unless configured (supplement C.2)."""
        self.theta.copy_(phi)
        self.memory = {}
        if self.reset_config.head:
            self.flat.reset_private()
        if self.reset_config.optimizer:
            self._clear_optimizer()
        if self.reset_config.statistics:
            self._clear_running_statistics()

    def restart(self, phi: Tensor) -> None:
        """theta <- phi [N] with a fresh head, optimizer state and running statistics: after a non-finite update."""
        self.theta.copy_(phi)
        self.memory = {}
        self.flat.reset_private()
        self._clear_optimizer()
        self._clear_running_statistics()

    def inner_step(self, observe: Observe | None = None) -> None:
        """theta <- theta - alpha grad L(theta) on the next batch, body and head together (Algorithm 2, line 9)."""
        if self.graphed_step is not None:
            self.graphed_step()
        else:
            self.step_on(self.next_batch(), observe)

    def step_on(self, batch: Batch, observe: Observe | None = None) -> None:
        """An inner step on `batch`, counted. Work of the device alone: a CUDA graph may record it."""
        metric = self._descend(batch, observe)
        self.counters[:3].add_(torch.stack((self._one, self.loss, metric)))

    def replay(self, first_step: int, steps: int) -> None:
        """Repeats `steps` inner steps on the batches from global step `first_step`; the counters ignore them."""
        self.seek(first_step)
        for _ in range(steps):
            self._descend(self.next_batch())

    def seek(self, step: int) -> None:
        """Makes global step `step` the next one: its batch and its learning rate."""
        self.batches.seek(step)
        self.step, self._peeked = step, None

    def next_batch(self) -> Batch:
        """The next inner step's batch: the one that `peek` has returned, if it was called."""
        batch, self._peeked = self._peeked or self.batches.next(), None
        return batch

    def peek(self) -> Batch:
        """The batch that the next inner step will consume."""
        self._peeked = self.next_batch()
        return self._peeked

    @torch.enable_grad()
    def compute_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Differentiable loss, and metric (0 if it is pooled), of this rank's share of a batch, in training mode.

        Raises:
            ValueError: the loss is not a scalar.
        """
        inputs, targets = batch
        step = self.batch_step if batch is self.batch else self.step  # a repeated forward pass repeats its masks
        with self.masks(step, len(targets)):
            outputs = self.forward(inputs)
        loss, metric = self.criterion.function(outputs, targets), self.criterion.metric
        if loss.ndim:
            raise ValueError(
                f"task {self.name}: its loss has shape {list(loss.shape)}; return the mean over the examples"
            )
        if metric is None or metric.pooled:
            return loss, torch.zeros_like(self._one)
        with torch.no_grad():
            return loss, torch.as_tensor(metric.function(outputs, targets), device=loss.device)

    def forward(self, inputs: Any, model: Callable[[Any], Any] | None = None) -> Any:
        """The outputs of `model`, by default the learner's; the loss is never computed in half precision."""
        with torch.autocast(self.theta.device.type, self.autocast, enabled=self.autocast is not None):
            outputs = (model or self.model)(inputs)
        return tree_map(lambda x: x.float() if x.dtype == self.autocast else x, outputs) if self.autocast else outputs

    def compute_gradient(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """`flat.grad` <- grad L(theta) on a batch; returns loss and metric of this rank's share."""
        loss, metric = self.compute_loss(batch)
        self.flat.differentiate(loss)
        self.group_mean(self.flat.grad)
        return loss.detach(), metric

    def group_mean(self, x: Tensor) -> Tensor:
        """`x` <- its mean over the data group, whose D ranks each have 1 / D of the batch."""
        if self.data_group is not None:
            dist.all_reduce(x, group=self.data_group)
            x.div_(self.data_group.size())
        return x

    @contextmanager
    def running_statistics_kept(self) -> Iterator[None]:
        """A block whose forward passes are not inner steps and leave batch norm's running statistics unchanged."""
        kept = [buffer.clone() for buffer in self.model.buffers()]
        yield
        for buffer, value in zip(self.model.buffers(), kept, strict=True):
            buffer.copy_(value)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Mean `loss` and metric, by its name, over every example of `batches` in evaluation mode; NaN without any."""
        metric, pool = self.criterion.metric, []
        total, count = torch.zeros(2, device=self.theta.device), 0
        self.model.eval()
        for inputs, targets in batches:
            outputs = self.forward(inputs)
            values = [self.criterion.function(outputs, targets), torch.zeros_like(self._one)]
            if metric is not None and metric.pooled:
                pool.append((outputs.cpu(), targets.cpu()))
            elif metric is not None:
                values[1] = torch.as_tensor(metric.function(outputs, targets), device=total.device)
            total += torch.stack(values) * len(targets)
            count += len(targets)
        self.model.train()
        loss, value = (total / count).tolist()
        if metric is None:
            return {"loss": loss}
        if pool:
            value = float(metric.function(*map(torch.cat, zip(*pool, strict=True))))
        return {"loss": loss, metric.name: metric.finish(value)}

    def flag_nonfinite(self, flag: Tensor) -> None:
        """Counts this step's update as excluded from the mean where the boolean `flag` [] is set."""
        self.counters[3:].add_(flag)

    def take_counters(self) -> Tensor:
        """Inner steps, loss, metric and non-finite updates [4], summed since the last call."""
        taken = self.counters.clone()
        self.counters.zero_()
        return taken

    def take_wait_seconds(self) -> float:
        """Seconds that the host has waited for batches since the last call."""
        waited, self.batches.wait_seconds = self.batches.wait_seconds, 0.0
        return waited

    @property
    def data_fingerprint(self) -> str:
        """Identifies the training data; empty if the batches cannot say."""
        return getattr(self.batches, "fingerprint", "")

    def state_dict(self) -> dict[str, Tensor]:
        """Parameters, optimizer state, buffers and memory by name; the tensors themselves, not copies."""
        state = {"parameters": self.flat.vector}
        state |= {f"memory.{name}": value for name, value in self.memory.items()}
        for key, value in self.optimizer.state[self.parameter].items():
            if value is not None:
                state[f"optimizer.{key}"] = value
        return state | {f"buffers.{name}": buffer for name, buffer in self.model.named_buffers()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores a `state_dict` on any device, including which optimizer states it has and lacks."""
        device = self.theta.device
        self.flat.vector.copy_(state["parameters"])
        self.optimizer.state[self.parameter].clear()
        buffers = dict(self.model.named_buffers())
        for key, value in state.items():
            kind, _, name = key.partition(".")
            if kind == "optimizer":
                self.optimizer.state[self.parameter][name] = value.to(device, copy=True)
            elif kind == "buffers":
                buffers[name].copy_(value)
            elif kind == "memory":
                self.memory[name] = value.to(device, copy=True)

    def _descend(self, batch: Batch, observe: Observe | None = None) -> Tensor:
        self.batch, self.batch_step = batch, self.step
        self.loss, metric = self.compute_gradient(batch)
        if observe is not None:
            observe(self)
        if self.schedule is not None:
            self.optimizer.param_groups[0]["lr"] = self.inner.lr * self.schedule(self.step)
        update(self.optimizer, self.parameter, self.inner, self.theta)
        self.step += 1
        return metric

    def _clear_optimizer(self) -> None:
        for value in self.optimizer.state[self.parameter].values():
            if value is not None:
                value.zero_()

    def _clear_running_statistics(self) -> None:
        for module in self.model.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase):
                module.reset_running_stats()
