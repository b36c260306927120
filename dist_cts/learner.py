"""A task learner: one task's body, head, batches and inner optimizer."""

from collections.abc import Callable, Iterable
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn

from dist_cts.config import Config
from dist_cts.flat import FlatParams

Criterion = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class InnerConfig(Config):
    """The inner optimizer; the defaults are the paper's image classification (section 4.2)."""

    optimizer: Literal["sgd", "nesterov", "adam"] = Field("sgd", description="sgd, nesterov or adam")
    lr: float = Field(0.01, gt=0, description="alpha, inner learning rate")
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum of sgd and nesterov; beta_1 of adam")
    weight_decay: float = Field(5e-4, ge=0, description="L2 decay of body and head in the inner loop")


class ResetConfig(Config):
    """What starts anew with theta at an episode's start; the paper resets none of it (supplement C.2)."""

    head: bool = Field(False, description="draw the head anew at every episode")
    optimizer: bool = Field(False, description="clear momentum at every episode")
    statistics: bool = Field(False, description="clear batch-norm running statistics at every episode")


class Batches(Protocol):
    """What feeds a learner: `batch_at(step)` for the global step, and how long the host waited for it."""

    wait_seconds: float

    def next(self) -> tuple[Tensor, Tensor]: ...

    def seek(self, step: int) -> None: ...


def make_optimizer(parameters: list[nn.Parameter], config: InnerConfig) -> torch.optim.Optimizer:
    """The inner optimizer; on a flat parameter its update is one fused kernel.

    Raises:
        ValueError: nesterov without momentum.
    """
    if config.optimizer == "adam":
        betas = (config.momentum, 0.999)
        return torch.optim.Adam(parameters, lr=config.lr, betas=betas, weight_decay=config.weight_decay, fused=True)
    nesterov = config.optimizer == "nesterov"
    if nesterov and config.momentum == 0:
        raise ValueError("inner.optimizer=nesterov needs inner.momentum above 0")
    return torch.optim.SGD(
        parameters,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=nesterov,
        fused=True,
    )


def classification(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy and accuracy, both means over the batch, of logits [B, C] and labels [B]."""
    loss = nn.functional.cross_entropy(logits.float(), labels)
    return loss, (logits.detach().argmax(1) == labels).float().mean()


class TaskLearner:
    """theta of one task, and all that its inner optimization keeps between steps.

    `theta` [N] is the body, a slice of the flat vector that also holds the head. With a data group, the group's ranks
    feed slices of one batch and average the gradient, so their theta have the same bits.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        head: str | None,
        batches: Batches,
        inner: InnerConfig,
        *,
        reset: ResetConfig | None = None,
        criterion: Criterion = classification,
        autocast: torch.dtype | None = None,
        data_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.name, self.model, self.batches = name, model, batches
        self.inner, self.criterion, self.autocast, self.data_group = inner, criterion, autocast, data_group
        self.reset_config = reset or ResetConfig()
        self.flat = FlatParams(model, head)
        self.head_init = self.flat.vector[self.theta.numel() :].clone()
        self.parameter = nn.Parameter(self.flat.vector)
        self.parameter.grad = self.flat.grad
        self.optimizer = make_optimizer([self.parameter], inner)
        # steps, loss, accuracy, non-finite: summed since the last reduction, on the device
        self.statistics = torch.zeros(4, device=self.theta.device)

    @property
    def theta(self) -> Tensor:
        """theta^(t) [N], the memory that the model computes with."""
        return self.flat.body

    def reset(self, phi: Tensor) -> None:
        """theta <- phi [N]; head, optimizer state and running statistics stay unless configured (supplement C.2)."""
        self.theta.copy_(phi)
        if self.reset_config.head:
            self.flat.vector[self.theta.numel() :].copy_(self.head_init)
        if self.reset_config.optimizer:
            self._clear_optimizer()
        if self.reset_config.statistics:
            self._clear_running_statistics()

    def restart(self, phi: Tensor) -> None:
        """Starts the learner anew from phi [N] with fresh head, momentum and statistics: after a non-finite update."""
        self.theta.copy_(phi)
        self.flat.vector[self.theta.numel() :].copy_(self.head_init)
        self._clear_optimizer()
        self._clear_running_statistics()

    @torch.enable_grad()
    def inner_step(self) -> None:
        """theta <- theta - alpha grad L(theta) on the next batch, body and head together (Algorithm 2, line 9)."""
        inputs, targets = self.batches.next()
        self.compute_gradient(inputs, targets)
        self.optimizer.step()

    def compute_gradient(self, inputs: Tensor, targets: Tensor) -> None:
        """`flat.grad` <- grad L(theta) on this batch; adds loss and accuracy to the statistics."""
        self.flat.grad.zero_()
        with torch.autocast(self.theta.device.type, self.autocast, enabled=self.autocast is not None):
            outputs = self.model(inputs)
        loss, accuracy = self.criterion(outputs, targets)
        loss.backward()
        if self.data_group is not None:  # each rank saw 1 / D of the batch
            dist.all_reduce(self.flat.grad, group=self.data_group)
            self.flat.grad.div_(self.data_group.size())
        self.statistics[0] += 1
        self.statistics[1] += loss.detach()
        self.statistics[2] += accuracy

    @torch.no_grad()
    def evaluate(self, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, float]:
        """Mean loss and accuracy (0 .. 1) over every example of `batches`, with running statistics."""
        self.model.eval()
        total = torch.zeros(2, device=self.theta.device)
        count = 0
        for inputs, targets in batches:
            with torch.autocast(self.theta.device.type, self.autocast, enabled=self.autocast is not None):
                outputs = self.model(inputs)
            total += torch.stack(self.criterion(outputs, targets)) * len(targets)
            count += len(targets)
        self.model.train()
        loss, accuracy = (total / count).tolist()
        return loss, accuracy

    def flag_nonfinite(self, flag: Tensor) -> None:
        """Marks this step's update as left out of the mean where the boolean `flag` is set."""
        self.statistics[3] += flag

    def take_statistics(self) -> Tensor:
        """Steps, loss, accuracy and non-finite flags [4], summed since the last call."""
        taken = self.statistics.clone()
        self.statistics.zero_()
        return taken

    def take_wait_seconds(self) -> float:
        """Seconds that the host waited for batches since the last call."""
        waited, self.batches.wait_seconds = self.batches.wait_seconds, 0.0
        return waited

    def state_dict(self) -> dict[str, Tensor]:
        """theta and head, optimizer state and running statistics by name; the tensors themselves, not copies."""
        state = {"parameters": self.flat.vector}
        for key, value in self.optimizer.state[self.parameter].items():
            if value is not None:
                state[f"optimizer.{key}"] = value
        return state | {f"buffers.{name}": buffer for name, buffer in self.model.named_buffers()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores what `state_dict` gave; the optimizer's state may be new here and is then created."""
        self.flat.vector.copy_(state["parameters"])
        buffers = dict(self.model.named_buffers())
        for key, value in state.items():
            kind, _, name = key.partition(".")
            if kind == "optimizer":
                self.optimizer.state[self.parameter][name] = value.clone()
            elif kind == "buffers":
                buffers[name].copy_(value)

    def _clear_optimizer(self) -> None:
        for value in self.optimizer.state[self.parameter].values():
            if value is not None:
                value.zero_()

    def _clear_running_statistics(self) -> None:
        for module in self.model.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase):
                module.reset_running_stats()
