"""TrainState: everything that training changes on this rank; checkpoints save and restore it."""

from dataclasses import dataclass, field

from torch import Tensor

from dist_cts.flat import FlatLayout
from dist_cts.learner import TaskLearner
from dist_cts.progress import Progress


@dataclass
class TrainState:
    """The replicated phi, this rank's learners in task order, and the run's progress.

    phi [N] is bit-identical on all ranks; `layout` names the tensors inside it. `reduced`: the deltas [N] that are not
    applied yet, by the step of their meta-gradients; complete after `MetaReducer.drain`.
    """

    phi: Tensor
    layout: FlatLayout
    learners: list[TaskLearner]
    progress: Progress
    reduced: dict[int, Tensor] = field(default_factory=dict)
