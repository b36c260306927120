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
    applied yet, by the step of their meta-gradients; complete after `MetaReducer.drain`. `velocity` [N]: of the outer
    momentum, the same on all ranks.
    `rest` is what a new task starts from besides phi and a head: constant, by name, the same on all ranks; empty unless
    `model.body` leaves something out.
    """

    phi: Tensor
    layout: FlatLayout
    learners: list[TaskLearner]
    progress: Progress
    reduced: dict[int, Tensor] = field(default_factory=dict)
    velocity: Tensor | None = None
    rest: Mapping[str, Tensor] = field(default_factory=dict)

    @cached_property
    def fingerprint(self) -> str:
        """Of phi's layout and of the values in `rest`: a checkpoint fits only the same ones."""
        values = hashlib.sha256()
        for name in sorted(self.rest):
            values.update(self.rest[name].cpu().reshape(-1).view(torch.uint8).numpy())
        return self.layout.fingerprint() + (f"-{values.hexdigest()[:16]}" if self.rest else "")

    def outer_state(self) -> dict[str, Tensor]:
        """What a checkpoint holds of the outer rule: `reduced`, under its steps, and `velocity`; often nothing."""
        state = {str(step): delta for step, delta in self.reduced.items()}
        return state if self.velocity is None else state | {"velocity": self.velocity}

    def load_outer_state(self, state: Mapping[str, Tensor]) -> None:
        """Restores an `outer_state`."""
        values = {key: value.to(self.phi.device) for key, value in state.items()}
        self.velocity = values.pop("velocity", None)
        self.reduced |= {int(step): delta for step, delta in values.items()}
