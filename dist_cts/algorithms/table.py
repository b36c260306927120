"""The table of algorithms, open to your own: each row is a meta-gradient, a period and a shift."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from dist_cts.algorithms import meta_gradients, shifts
from dist_cts.algorithms.meta_gradients import GradientBatch, IMAMLConfig, LeapConfig
from dist_cts.config import Config
from dist_cts.learner import TaskLearner
from dist_cts.progress import Progress
from dist_cts.registry import check_options, lookup


class MethodConfig(Config):
    """Options of the algorithm; setting one that the algorithm does not use is an error."""

    shift_every: int | None = Field(None, gt=0, description="inner steps between meta-updates; default 1, divides K")
    shift_scale: float | None = Field(None, gt=0, description="factor on the shift of theta; default 1")
    delay: int = Field(
        0, ge=0, description="inner steps during which a reduction runs before phi and theta are shifted"
    )
    meta_gradient: Literal["reptile", "fomaml"] | None = Field(
        None, description="reptile or fomaml, for algorithms that update phi within an episode; default reptile"
    )
    gradient_batch: GradientBatch | None = Field(
        None, description="for fomaml and imaml: the last inner batch, or the next, unseen one; default last"
    )
    imaml: IMAMLConfig = IMAMLConfig()
    leap: LeapConfig = LeapConfig()
    args: dict[str, Any] = Field({}, description="options of a method of your own")


def _nothing(learner: TaskLearner) -> None:
    pass


@dataclass(frozen=True)
class Algorithm:
    """A row: every `period` inner steps (None: once per episode, after K) phi is updated and theta shifted.

    `begin` is called at the start of an episode, `observe` in every inner step between gradient and update.
    `evaluations` counts the gradient evaluations per meta-gradient in addition to the inner steps; `replays`: the shift
    repeats the episode. `takes` names the options of `MethodConfig` that this row uses.
    """

    meta_gradient: Callable[[TaskLearner, Tensor], Tensor]
    period: int | None
    shift: Callable[[TaskLearner, Tensor, Tensor, Progress], None] = shifts.none
    begin: Callable[[TaskLearner], None] = _nothing
    observe: Callable[[TaskLearner], None] | None = None
    evaluations: int = 0
    replays: bool = False
    takes: tuple[str, ...] = ()

    def gradient_evaluations(self, K: int) -> int:
        """Gradient evaluations per task and episode of K inner steps, as counted in the paper's Figure 4d.

        A Hessian-vector product counts as two.
        """
        period = self.period or K
        replayed = sum(range(period, K, period)) if self.replays else 0
        return K + K // period * self.evaluations + replayed

    def evaluations_per_meta_update(self, K: int) -> float:
        """`gradient_evaluations` per task, divided by the number of meta-updates in an episode."""
        return self.gradient_evaluations(K) / (K // (self.period or K))

    def cost_note(self, K: int) -> str | None:
        """A warning for methods that cost more than twice the inner steps; None otherwise."""
        evaluations = self.gradient_evaluations(K)
        if evaluations <= 2 * K:
            return None
        why = "k of them at inner step k, which replays the episode from the new phi; " if self.replays else ""
        return f"costs {evaluations} gradient evaluations per task and episode: {why}{evaluations / K:.3g} times cts"


def table(method: MethodConfig, seed: int = 0) -> dict[str, Algorithm]:
    """All rows, with their options. mtl is joint training; with one task it is single-task training."""
    every, scale = method.shift_every or 1, method.shift_scale or 1.0
    batch = method.gradient_batch or "last"
    fomaml, held_out = partial(meta_gradients.fomaml, batch=batch), int(batch == "next")
    gradient, cost = (fomaml, 1) if method.meta_gradient == "fomaml" else (meta_gradients.reptile, 0)
    inside = ("shift_every", "meta_gradient", "gradient_batch")
    late = (*inside, "delay")  # phi and theta take a meta-update as well some steps later
    return {
        "cts": Algorithm(
            gradient, every, partial(shifts.continual, scale=scale), evaluations=cost, takes=(*late, "shift_scale")
        ),
        "no_shifting": Algorithm(gradient, every, evaluations=cost, takes=late),
        "random_shifting": Algorithm(
            gradient,
            every,
            partial(shifts.random, seed=seed, scale=scale),
            evaluations=cost,
            takes=(*late, "shift_scale"),
        ),
        "accurate": Algorithm(
            gradient, every, shifts.exact, begin=shifts.begin_exact, evaluations=cost, replays=True, takes=inside
        ),
        "reptile": Algorithm(meta_gradients.reptile, None),
        "fomaml": Algorithm(fomaml, None, evaluations=1, takes=("gradient_batch",)),
        "fomaml++": Algorithm(
            meta_gradients.fomaml_plus_plus,
            None,
            begin=meta_gradients.begin_fomaml_plus_plus,
            observe=meta_gradients.observe_fomaml_plus_plus,
        ),
        "imaml": Algorithm(
            partial(meta_gradients.imaml, options=method.imaml, batch=batch),
            None,
            begin=meta_gradients.begin_imaml,
            observe=partial(meta_gradients.observe_imaml, options=method.imaml),
            evaluations=1 + held_out + 2 * method.imaml.cg_iterations,
            takes=("gradient_batch",),
        ),
        "leap": Algorithm(
            meta_gradients.leap,
            None,
            begin=meta_gradients.begin_leap,
            observe=partial(meta_gradients.observe_leap, options=method.leap),
        ),
        "mtl": Algorithm(meta_gradients.reptile, 1, shifts.rejoin),
    }


# Open to rows of one's own: an Algorithm, or a function of `method.args` that returns one.
ALGORITHMS: dict[str, Algorithm | Callable[..., Algorithm]] = {**table(MethodConfig())}
_SHIPPED = dict(ALGORITHMS)


def make_algorithm(name: str, method: MethodConfig, *, inner_steps: int, meta_lr: float, seed: int) -> Algorithm:
    """The row called `name` for episodes of K = `inner_steps`; `seed` seeds the directions of random_shifting.

    Raises:
        ValueError: unknown name or incompatible options.
    """
    row = lookup("algorithm", name, ALGORITHMS)
    if row is _SHIPPED.get(name):
        row = table(method, seed)[name]
    if isinstance(row, Algorithm) and method.args:
        raise ValueError(f"method.args={method.args}: algorithm={name} takes no options of its own; leave it out")
    if not isinstance(row, Algorithm):
        check_options("method.args", row, method.args)
        row = row(**method.args)
    for option in ("shift_every", "shift_scale", "delay", "meta_gradient", "gradient_batch"):
        value = getattr(method, option)
        if value not in (None, 0) and option not in row.takes:
            why = "updates phi once per episode, without shift" if row.period is None else "does not use it"
            raise ValueError(f"method.{option}={value}: algorithm={name} {why}; leave it out")
    if method.gradient_batch is not None and row.evaluations == 0:
        raise ValueError(
            f"method.gradient_batch={method.gradient_batch}: the Reptile difference uses no batch; "
            "set method.meta_gradient=fomaml too, or leave it out"
        )
    if inner_steps % (row.period or inner_steps):
        raise ValueError(
            f"method.shift_every={row.period} does not divide inner_steps={inner_steps}: the last "
            f"{inner_steps % row.period} steps of each episode would be lost"
        )
    if method.delay >= inner_steps:
        raise ValueError(
            f"method.delay={method.delay} must be below inner_steps={inner_steps}: no meta-update would arrive within "
            "its episode"
        )
    if name in ("imaml", "leap") and inner_steps == 1:
        raise ValueError(f"algorithm={name} needs a trajectory: set inner_steps to 2 or more, not 1")
    if name == "mtl" and meta_lr != 1:
        raise ValueError(f"algorithm=mtl is joint training, phi is the mean of theta: set meta_lr=1, not {meta_lr}")
    return row
