"""The table of algorithms: a meta-gradient, a period and a shift each."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from dist_cts import meta_gradients, shifts
from dist_cts.learner import TaskLearner


@dataclass(frozen=True)
class Algorithm:
    """A row: every `period` inner steps (None: once an episode, after K) phi is updated and theta shifted."""

    meta_gradient: Callable[[TaskLearner, Tensor], Tensor]
    period: int | None
    shift: Callable[[TaskLearner, Tensor], None]


ALGORITHMS = {
    "cts": Algorithm(meta_gradients.reptile, 1, shifts.continual),
    "no_shifting": Algorithm(meta_gradients.reptile, 1, shifts.none),
    "reptile": Algorithm(meta_gradients.reptile, None, shifts.none),
}
