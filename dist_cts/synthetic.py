"""The paper's synthetic tasks (section 4.1): shifted and rotated copies of one two-dimensional function.

`meta_train_point` trains one initialization with the same learners and loop as for images; `quality` evaluates all
points of a grid at once. Points are float64; G initializations, T tasks.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor, nn

from dist_cts.algorithms.table import ALGORITHMS
from dist_cts.config import Config
from dist_cts.config_faults import words
from dist_cts.distributed.placement import place
from dist_cts.distributed.process_group import process_group
from dist_cts.distributed.reducer import MetaReducer
from dist_cts.errors import RunError
from dist_cts.learner import InnerConfig, ResetConfig, TaskLearner, make_optimizer
from dist_cts.losses import Loss
from dist_cts.meta_train import meta_train
from dist_cts.progress import Progress
from dist_cts.state import TrainState

Point = tuple[float, float]


class Environment(Config):
    """T tasks: the template of `losses`, shifted to a center and rotated by an angle each."""

    centers: tuple[Point, ...] = Field(min_length=1, description="[T][2], center of each task")
    angles: tuple[float, ...] = Field(description="[T], rotation of each task in radians")
    coeff: Point = Field(description="weights of the two squared terms")
    scale: float = Field(gt=0, description="scale factor of the template in the plane")

    @model_validator(mode="after")
    def _one_angle_a_center(self) -> "Environment":
        if len(self.angles) != len(self.centers):
            raise ValueError(f"{len(self.centers)} centers but {len(self.angles)} angles: expected one per center")
        return self

    @property
    def tasks(self) -> int:
        """T."""
        return len(self.centers)

    def task(self, index: int) -> "Environment":
        """The environment with only that task."""
        return self.model_copy(update={"centers": (self.centers[index],), "angles": (self.angles[index],)})


_CENTERS = tuple((5 + 7 * math.sin(math.tau * t / 8), 5 + 7 * math.cos(math.tau * t / 8)) for t in range(8))
_ANGLES = (0.9192, 1.1151, 4.4152, 5.9906, 3.9030, 4.0177, 3.1373, 0.2803)
ENVIRONMENTS = {
    # the constants of the published code
    "released": Environment(centers=_CENTERS, angles=_ANGLES, coeff=(0.7385, 0.9954), scale=3),
    # what the paper prints; it gives neither radius nor angles, so they are those of the published code
    "paper": Environment(centers=_CENTERS, angles=_ANGLES, coeff=(1 / 3, 1 / 3), scale=1),
}
METHODS = ("cts", "reptile", "accurate", "no_shifting")  # the methods of section 4.1
# Initializations are evaluated with Adam: the paper's momentum SGD solves every task from nearly everywhere (mean loss
# 0.003 after 100 steps over the plane).
TEST = InnerConfig(optimizer="adam", lr=0.1, momentum=0.9, weight_decay=0)
TEST_STEPS = 100


def load_environment(name: str) -> Environment:
    """The environment called `name`, or the one in the JSON file `name`.

    Raises:
        FileNotFoundError: neither an environment nor a file has that name.
        ValueError: invalid, missing or unknown fields in the file; the message names them.
    """
    if name in ENVIRONMENTS:
        return ENVIRONMENTS[name]
    if not Path(name).exists():
        raise FileNotFoundError(f"no environment {name!r}: choose {' or '.join(ENVIRONMENTS)}, or name a JSON file")
    try:
        return Environment.model_validate_json(Path(name).read_bytes())
    except ValidationError as error:
        faults = error.errors(include_url=False)
        text = "; ".join(": ".join((*map(str, fault["loc"]), words(fault))) for fault in faults)
        raise ValueError(f"{name}: {text}") from None


def losses(env: Environment, points: Tensor) -> Tensor:
    """Every task's loss [..., T] at `points` [..., T, 2], or [..., 1, 2] for the same point in all tasks.

    With d = point - center, turned by the angle and divided by the scale into (u, v), it is
    c0 (u^2 + v - 11)^2 + c1 (u + v^2 - 7)^2, zero at four minima: the paper's f, which has (u, v) = (x - 5, y - 5).
    """
    centers_x, centers_y, cos, sin = constants(env)
    x, y = points[..., 0] - centers_x, points[..., 1] - centers_y
    u, v = cos * x - sin * y, sin * x + cos * y
    return env.coeff[0] * (u * u + v - 11) ** 2 + env.coeff[1] * (u + v * v - 7) ** 2


@lru_cache
def constants(env: Environment) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Centres' x and y, cosine and sine of the angles over the scale: [T] each."""
    centers, angles = (torch.tensor(values, dtype=torch.float64) for values in (env.centers, env.angles))
    return centers[:, 0], centers[:, 1], angles.cos() / env.scale, angles.sin() / env.scale


def quality(env: Environment, phi: Tensor, inner: InnerConfig = TEST, steps: int = TEST_STEPS) -> Tensor:
    """Task-average loss [G] after `steps` steps from `phi` [G, 2]; nan or inf where they diverge (Figures 4c, 5c)."""
    theta = nn.Parameter(phi[:, None].repeat(1, env.tasks, 1))  # [G, T, 2]; the optimizers' updates are elementwise
    optimizer = make_optimizer([theta], inner)
    for _ in range(steps):
        (theta.grad,) = torch.autograd.grad(losses(env, theta).sum(), theta)
        optimizer.step()
    return losses(env, theta.detach()).mean(1)


class TaskPoint(nn.Module):
    """A model whose only parameter is a point of the plane and whose output is the task's loss there."""

    def __init__(self, env: Environment, task: int) -> None:
        super().__init__()
        self.env = env.task(task)
        self.point = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, _: Tensor) -> Tensor:
        """The scalar loss; the input is ignored."""
        return losses(self.env, self.point[None])[0]


class NoBatches:
    """Batches of a task without data; `taken` counts gradient evaluations, replays included."""

    def __init__(self) -> None:
        self.taken, self.step, self.wait_seconds = 0, 0, 0.0

    def next(self) -> tuple[Tensor, Tensor]:
        self.taken += 1
        self.step += 1
        return torch.empty(0), torch.empty(0)

    def seek(self, step: int) -> None:
        self.step = step


@dataclass(frozen=True)
class Trajectory:
    """The path of one run.

    phi [1 + updates, 2]: the initialization, then after every meta-update. theta [T, M K, 2]: after every inner step
    and shift. inner_gradient_steps [1 + updates]: gradient evaluations per task up to each phi.
    """

    phi: Tensor
    theta: Tensor
    inner_gradient_steps: list[int]


def meta_train_point(
    env: Environment,
    start: Point,
    algorithm: str,
    inner: InnerConfig,
    *,
    beta: float,
    M: int,
    K: int,
    reset_optimizer: bool = False,
) -> Trajectory:
    """Meta-trains one initialization with TaskLearner, MetaReducer and Algorithm 2, in a process group of one rank.

    Raises:
        RunError: a task's theta is not finite; the message names task and step.
    """
    learners = [
        TaskLearner(
            f"task {task + 1}",
            TaskPoint(env, task),
            None,
            NoBatches(),
            inner,
            reset=ResetConfig(optimizer=reset_optimizer),
            criterion=Loss(lambda loss, _: loss),
        )
        for task in range(env.tasks)
    ]
    point = learners[0].flat.body_layout.views
    phi = torch.zeros_like(learners[0].theta)
    point(phi)["point"].copy_(torch.tensor(start))
    row, progress = ALGORITHMS[algorithm], Progress(K)
    path, spent, thetas = [point(phi)["point"].clone()], [0], []

    def record() -> None:
        thetas.append(torch.stack([point(learner.theta)["point"] for learner in learners]))
        progress.stopping = not thetas[-1].isfinite().all()
        if progress.step % (row.period or K) == 0:
            path.append(point(phi)["point"].clone())
            spent.append(learners[0].batches.taken)

    with process_group(torch.device("cpu"), timeout_seconds=60):
        reducer = MetaReducer(phi, learners, place(env.tasks, 1, 0))
        state = TrainState(phi, learners[0].flat.body_layout, learners, progress)
        meta_train(state, row, reducer, beta=beta, M=M, K=K, after_step=record)
    if progress.stopping:
        task = thetas[-1].isfinite().all(1).tolist().index(False)
        raise RunError(
            f"{learners[task].name} diverges at step {progress.step} from the initialization {tuple(start)}: lower "
            "the inner learning rate, or use --env released, whose losses are flatter than the paper's printed ones"
        )
    return Trajectory(torch.stack(path), torch.stack(thetas, 1), spent)
