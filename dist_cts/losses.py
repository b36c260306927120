"""Losses, one row of LOSSES each, with the metric that metrics.jsonl, TensorBoard, tables and plots report."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated

import torch
from pydantic import BeforeValidator, ConfigDict, Field
from torch import Tensor
from torch.nn import functional as F

from dist_cts.config import Config
from dist_cts.registry import check_options, lookup

# Keys of a record in metrics.jsonl besides the loss and the metrics.
RESERVED = {
    "step",
    "cumulative_inner_steps",
    "episode",
    "inner_step",
    "task",
    "rank",
    "steps_per_second",
    "wait_seconds",
}


@dataclass(frozen=True)
class Metric:
    """What a loss reports beside its value.

    `function` takes outputs and targets and returns a mean over the examples, a scalar tensor; `finish` turns the mean
    over many batches into the reported number. With `pooled`, `function` sees all outputs of the test split at once, on
    the CPU, and training batches have no metric. `percent`: a share, 0 .. 1, shown in %.
    """

    name: str
    function: Callable[[Tensor, Tensor], Tensor]
    higher_is_better: bool = True
    percent: bool = False
    pooled: bool = False
    finish: Callable[[float], float] = float

    def __post_init__(self) -> None:
        if self.name in RESERVED:
            raise ValueError(f"a metric cannot be called {self.name!r}: metrics.jsonl has a key of that name")

    def show(self, value: float) -> str:
        """Name and value for a log line: `accuracy 93.1 %`, `rmse 0.0214`."""
        return f"{self.name} {100 * value:.1f} %" if self.percent else f"{self.name} {value:.4g}"


@dataclass(frozen=True)
class Loss:
    """A row of the table: `function(outputs, targets, **options)` returns a scalar, the mean over the examples.

    The parameters of `function` after the first two are the options that `loss:` may set.
    """

    function: Callable[..., Tensor]
    metric: Metric | None = None

    @property
    def reported(self) -> Metric:
        """What a meta-test compares: the metric, or the loss itself where there is none."""
        return self.metric or Metric("loss", self.function, higher_is_better=False)


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """The share of logits [B, C, ...] whose largest is at the label: int64 [B, ...], or probabilities [B, C, ...]."""
    if labels.is_floating_point():
        labels = labels.argmax(1)
    return (logits.argmax(1) == labels).float().mean()


def average_precision(logits: Tensor, labels: Tensor) -> Tensor:
    """mAP of logits [N, C] against labels 0 or 1 [N, C]: the mean over the classes with positives; NaN without any."""
    from sklearn.metrics import average_precision_score  # late, as it takes half a second

    scores, truth = logits.double().numpy(), labels.bool().numpy()
    present = truth.any(0)
    if not present.any():
        return torch.tensor(math.nan)
    return torch.tensor(average_precision_score(truth[:, present], scores[:, present], average="macro"))


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0) -> Tensor:
    """Cross entropy of logits [B, C, ...] and labels, int64 [B, ...] or probabilities [B, C, ...]."""
    if logits.ndim > 2 and not labels.is_floating_point():
        # One row per label: with more dimensions, PyTorch's kernel for GPUs is not deterministic.
        logits, labels = logits.movedim(1, -1).flatten(0, -2), labels.flatten()
    return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)


def bce(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross entropy of logits [B, C] and labels 0 or 1 [B, C], any dtype: several labels per example.

    Raises:
        ValueError: outputs and targets have different shapes.
    """
    return F.binary_cross_entropy_with_logits(logits, _alike("bce", logits, labels))


def mse(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error; outputs and targets have the same shape.

    Raises:
        ValueError: they have not; broadcasting [B, 1] against [B] would compare every output with every target.
    """
    return F.mse_loss(outputs, _alike("mse", outputs, targets))


def l1(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean absolute error; outputs and targets have the same shape.

    Raises:
        ValueError: they have not.
    """
    return F.l1_loss(outputs, _alike("l1", outputs, targets))


ACCURACY = Metric("accuracy", accuracy, percent=True)
MAP = Metric("mAP", average_precision, percent=True, pooled=True)
RMSE = Metric("rmse", mse, higher_is_better=False, finish=math.sqrt)
MAE = Metric("mae", l1, higher_is_better=False)

LOSSES = {
    "cross_entropy": Loss(cross_entropy, ACCURACY),
    "bce": Loss(bce, MAP),
    "mse": Loss(mse, RMSE),
    "l1": Loss(l1, MAE),
}
CROSS_ENTROPY = LOSSES["cross_entropy"]


class LossConfig(Config):
    """The name of a row of LOSSES, and its options beside it: {name: cross_entropy, label_smoothing: 0.1}."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(
        "cross_entropy", description="cross_entropy (option label_smoothing), bce (multi-label), mse, l1, or your own"
    )


# A configuration may give the name alone, `loss: mse`.
LossField = Annotated[LossConfig, BeforeValidator(lambda value: {"name": value} if isinstance(value, str) else value)]


def make_loss(config: LossConfig) -> Loss:
    """The row that a configuration names, its options bound.

    Raises:
        ValueError: unknown name or option, or an option of the wrong type.
    """
    row, options = lookup("loss", config.name, LOSSES), config.model_extra or {}
    check_options("loss", row.function, options, skip=2)
    return replace(row, function=partial(row.function, **options)) if options else row


def _alike(name: str, outputs: Tensor, targets: Tensor) -> Tensor:
    """The targets in the outputs' dtype."""
    if outputs.shape != targets.shape:
        shapes = f"{list(outputs.shape)} and {list(targets.shape)}"
        raise ValueError(f"loss={name} needs outputs and targets of one shape, found {shapes}")
    return targets.to(outputs.dtype)
