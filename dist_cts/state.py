"""TrainState: everything that training changes on this rank, and so what a checkpoint saves and restores."""

from dataclasses import dataclass

from torch import Tensor

from dist_cts.flat import FlatLayout
from dist_cts.learner import TaskLearner
from dist_cts.progress import Progress


@dataclass
class TrainState:
    """The replicated phi, this rank's learners in task order, and how far the run is.

    phi [N] has the same bits on every rank; `layout` names the tensors inside it.
    """

    phi: Tensor
    layout: FlatLayout
    learners: list[TaskLearner]
    progress: Progress
