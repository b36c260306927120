"""TrainState: everything that training changes on this rank; checkpoints save and restore it."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from dist_cts.flat import FlatLayout
from dist_cts.learner import TaskLearner
from dist_cts.progress import Progress


@dataclass
class TrainState:
    """The replicated phi, this rank's learners in task order, and the run's progress.

    phi [N] is bit-identical on all ranks; `layout` names the tensors inside it. `reduced`: the deltas [N] that are not
    applied yet, by the step of their meta-gradients; complete after `MetaReducer.drain`.
    `rest` is what a new task starts from besides phi and a head: constant, by name, the same on all ranks; empty unless
    `model.body` leaves something out.
    """

    phi: Tensor
    layout: FlatLayout
    learners: list[TaskLearner]
    progress: Progress
    reduced: dict[int, Tensor] = field(default_factory=dict)
    rest: Mapping[str, Tensor] = field(default_factory=dict)

    @cached_property
    def fingerprint(self) -> str:
        """Of phi's layout and of the values in `rest`: a checkpoint fits only the same ones."""
        values = hashlib.sha256()
        for name in sorted(self.rest):
            values.update(self.rest[name].cpu().reshape(-1).view(torch.uint8).numpy())
        return self.layout.fingerprint() + (f"-{values.hexdigest()[:16]}" if self.rest else "")
