"""Per-task meta-gradients: vectors [N] that the reducer averages.

Each one reuses the learner's gradient buffer, which the next inner step clears. Methods that need the trajectory have
`begin_`, called right after theta <- phi, and `observe_`, called in every inner step between gradient and update, when
loss and gradient are those of theta_(k-1). All of them use only the body: the head is not part of phi.
"""

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from dist_cts.config import Config
from dist_cts.learner import Batch, TaskLearner

GradientBatch = Literal["last", "next"]


class IMAMLConfig(Config):
    """Implicit MAML. The paper gives no values; the defaults are the released code's, except the proximal term."""

    lam: float = Field(0.5, gt=0, description="lambda of I + H / lambda and of the proximal term")
    cg_iterations: int = Field(10, gt=0, description="conjugate-gradient iterations, one Hessian-vector product each")
    damping: float = Field(0.0, ge=0, description="added to I in I + H / lambda")
    proximal: bool = Field(True, description="lambda/2 ||theta - phi||^2 in the inner loss; the released code omits it")


class LeapConfig(Config):
    """Leap; the defaults are those of its authors' code and of the paper's released code, but for `head`."""

    norm: bool = Field(True, description="path length; false: energy, segments not divided by their length")
    loss: bool = Field(True, description="the loss is a coordinate of the path; false: only the parameters")
    stabilizer: bool = Field(True, description="count an increase of the loss as a decrease")
    head: bool = Field(False, description="include the head in a segment's length, as the released code does")


def reptile(learner: TaskLearner, phi: Tensor) -> Tensor:
    """phi - theta_k [N], the Reptile difference (Nichol et al., 2018; paper, section 3.1)."""
    return torch.sub(phi, learner.theta, out=_spent_gradient(learner))


def fomaml(learner: TaskLearner, phi: Tensor, batch: GradientBatch = "last") -> Tensor:
    """grad L(theta_k) [N] (Finn et al., 2017; paper, section 3.1); costs one gradient evaluation.

    L is the loss of the `last` batch, as in the paper, or of the `next` one, which this episode has not seen; the
    released code uses held-out images.
    """
    with learner.running_statistics_kept():
        learner.compute_gradient(learner.batch if batch == "last" else learner.peek())
    return _spent_gradient(learner)


def begin_fomaml_plus_plus(learner: TaskLearner) -> None:
    """Initializes the mean of the inner gradients."""
    learner.memory = {"gradient": torch.zeros_like(learner.theta), "steps": learner.theta.new_zeros(())}


def observe_fomaml_plus_plus(learner: TaskLearner) -> None:
    """Adds grad L_k(theta_(k-1)) without the optimizer's weight decay."""
    learner.memory["gradient"] += _spent_gradient(learner)
    learner.memory["steps"] += 1


def fomaml_plus_plus(learner: TaskLearner, phi: Tensor) -> Tensor:
    """The mean of the inner gradients at theta_0 .. theta_(K-1) [N]: MAML++'s multi-step loss, to first order.

    MAML++ uses the losses at theta_1 .. theta_K, with weights that start at 1/K (Antoniou et al., 2018, section 4).
    Here theta_0 replaces theta_K, because the gradients at theta_0 .. theta_(K-1) are those of the inner steps and
    cost nothing; the two means differ by 1/K of one gradient's change over the episode. The weights 1/K keep the sum
    on FOMAML's scale. With plain SGD this is (phi - theta_K) / (alpha K), Reptile on another scale, and its beta is
    alpha K times Reptile's; momentum and weight decay break the equality. (The released code has no FOMAML++. A
    FOMAML update in every inner step without a shift is no_shifting with meta_gradient=fomaml.)
    """
    return torch.div(learner.memory["gradient"], learner.memory["steps"], out=_spent_gradient(learner))


def begin_imaml(learner: TaskLearner) -> None:
    """Stores phi, the center of the proximal term.

    Raises:
        ValueError: several ranks share the task; synchronized batch norm has no second derivative.
    """
    if learner.data_group is not None:
        raise ValueError(
            f"algorithm=imaml: {learner.data_group.size()} ranks share task {learner.name}, but Hessian-vector "
            "products need the full batch on one rank; start at most one rank per task"
        )
    learner.memory = {"phi": learner.theta.clone()}


def observe_imaml(learner: TaskLearner, options: IMAMLConfig) -> None:
    """Adds the gradient of the proximal term, lambda (theta - phi)."""
    if options.proximal:
        _spent_gradient(learner).add_(learner.theta - learner.memory["phi"], alpha=options.lam)


def imaml(learner: TaskLearner, phi: Tensor, options: IMAMLConfig, batch: GradientBatch = "last") -> Tensor:
    """(I + H / lambda)^-1 grad L(theta_K) [N], by conjugate gradient (Rajeswaran et al., 2019, Lemma 1).

    H is the Hessian of the last inner batch's loss with respect to the body, the head fixed. The formula follows from
    the stationarity of L + lambda/2 ||theta - phi||^2, hence the proximal term; the paper's code ran without it.
    """
    with learner.running_statistics_kept():
        if batch == "next":
            learner.compute_gradient(learner.peek())
        last_gradient, hessian = hessian_operator(learner, learner.batch)
        gradient = last_gradient if batch == "last" else _spent_gradient(learner)

        def matrix(v: Tensor) -> Tensor:
            return (1 + options.damping) * v + hessian(v) / options.lam

        solution = conjugate_gradient(matrix, gradient, options.cg_iterations)
    return _spent_gradient(learner).copy_(solution)


def hessian_operator(learner: TaskLearner, batch: Batch) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """grad L [N] in the body, and v [N] -> H v [N] by a second backward pass over the gradient's graph."""
    layout, parameters = learner.flat.body_layout, dict(learner.model.named_parameters())
    body = [parameters[slot.name] for slot in layout.slots]

    def pack(tensors: tuple[Tensor, ...]) -> Tensor:
        vector = torch.zeros_like(learner.theta)
        for view, tensor in zip(layout.views(vector).values(), tensors, strict=True):
            view.copy_(tensor.detach())
        return vector

    with torch.enable_grad():
        loss, _ = learner.compute_loss(batch)
        gradients = torch.autograd.grad(loss, body, create_graph=True)

    def product(v: Tensor) -> Tensor:
        parts = list(layout.views(v).values())
        return pack(torch.autograd.grad(gradients, body, parts, retain_graph=True, materialize_grads=True))

    return pack(gradients), product


def conjugate_gradient(matrix: Callable[[Tensor], Tensor], b: Tensor, iterations: int) -> Tensor:
    """x with `matrix`(x) = b [N], for a symmetric positive definite `matrix`, without a device-to-host sync.

    Stops at a direction of nonpositive curvature, which the Hessian of a network may have; x = b if it is the first
    direction.
    """
    x, residual, direction = torch.zeros_like(b), b.clone(), b.clone()
    square = residual @ residual
    going = torch.ones_like(square, dtype=torch.bool)
    begun = ~going
    for _ in range(iterations):
        image = matrix(direction)
        curvature = direction @ image
        going = going & (curvature > 0)
        begun = begun | going
        step = torch.where(going, square / curvature, 0.0)
        x += step * direction
        residual -= step * image
        new_square = residual @ residual
        going = going & (new_square > 0)
        direction = torch.where(going, residual + new_square / square * direction, 0.0)
        square = new_square
    return torch.where(begun, x, b)


def begin_leap(learner: TaskLearner) -> None:
    """Initializes the sum over the path's segments."""
    learner.memory = {"sum": torch.zeros_like(learner.theta)}


def observe_leap(learner: TaskLearner, options: LeapConfig) -> None:
    """Adds the segment that ends at (theta_(k-1), its loss) and stores this point for the next segment.

    Each point's loss and gradient are those of its own batch. (The released code observes after the update and so pairs
    each loss with the parameters one step later; Leap's authors observe before it, as here.)
    """
    memory, loss = learner.memory, learner.group_mean(learner.loss.clone())
    point = learner.flat.vector if options.head else learner.theta
    if "loss" in memory:
        rise = loss - memory["loss"]
        memory["sum"] += leap_segment(memory["point"], point, memory["gradient"], rise, options)
    gradient = _spent_gradient(learner)
    learner.memory = {"sum": memory["sum"], "point": point.clone(), "gradient": gradient.clone(), "loss": loss}


def leap_segment(start: Tensor, end: Tensor, gradient: Tensor, rise: Tensor, options: LeapConfig) -> Tensor:
    """The gradient [N] of a segment's length with respect to phi, with the trajectory's Jacobian set to I, as in Leap.

    `start`, `end` [N or more]: its points, of which the first N are the body; `gradient` [N] at its start; `rise` of
    the loss along it.
    """
    if options.stabilizer:
        rise = -rise.abs()
    step = start - end
    pull = step[: gradient.numel()]
    square = step @ step
    if options.loss:
        pull = pull - rise * gradient
        square = square + rise * rise
    if options.norm:
        pull = pull / square.sqrt().clamp_min(torch.finfo(square.dtype).tiny)  # zero without movement
    return pull


def leap(learner: TaskLearner, phi: Tensor) -> Tensor:
    """The gradient [N] of the length of the path theta_0 .. theta_(K-1) (Flennerhag et al., 2018).

    It has K - 1 segments: theta_K is not included, because no inner step computes its loss.
    """
    return _spent_gradient(learner).copy_(learner.memory["sum"])


def _spent_gradient(learner: TaskLearner) -> Tensor:
    return learner.flat.grad[: learner.theta.numel()]
