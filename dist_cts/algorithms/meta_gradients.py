"""Meta-gradients: what a task asks of phi, a vector [N] for the reducer to average.

Each writes into the memory of the learner's spent gradient, which the next inner step clears. Those that look at a
whole episode have a `begin_`, called when theta has just become phi, and an `observe_`, called in every inner step
between gradient and update, when theta_(k-1), its loss and its gradient belong together. All of them see the body
alone: the head is no part of phi.
"""

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from dist_cts.config import Config
from dist_cts.learner import TaskLearner

GradientBatch = Literal["last", "next"]


class IMAMLConfig(Config):
    """Implicit MAML. The paper gives no values; these are those of its published code, the proximal term apart."""

    lam: float = Field(0.5, gt=0, description="lambda of I + H / lambda and of the proximal term")
    cg_iterations: int = Field(10, gt=0, description="conjugate-gradient iterations, a Hessian-vector product each")
    damping: float = Field(0.0, ge=0, description="added to the I of I + H / lambda")
    proximal: bool = Field(True, description="lambda/2 ||theta - phi||^2 in the inner loss; the released code omits it")


class LeapConfig(Config):
    """Leap; the defaults are those of its authors' code and of the paper's."""

    norm: bool = Field(True, description="path length; false: its energy, segments not divided by their length")
    loss: bool = Field(True, description="the loss is a coordinate of the path; false: the parameters alone")
    stabilizer: bool = Field(True, description="a rise of the loss counts as a fall")
    head: bool = Field(False, description="the head counts in a segment's length, as in the released code")


def reptile(learner: TaskLearner, phi: Tensor) -> Tensor:
    """phi - theta_k [N], the Reptile difference (Nichol et al., 2018; paper, section 3.1)."""
    return torch.sub(phi, learner.theta, out=_spent_gradient(learner))


def fomaml(learner: TaskLearner, phi: Tensor, batch: GradientBatch = "last") -> Tensor:
    """grad L(theta_k) [N] (Finn et al., 2017; paper, section 3.1), at the price of one gradient evaluation.

    The paper's L_k is the loss of the `last` batch; `next` is one that this episode has not seen, which stands for the
    quarter of the images that the released code holds out.
    """
    with learner.running_statistics_kept():
        learner.compute_gradient(learner.batch if batch == "last" else learner.peek())
    return _spent_gradient(learner)


def begin_fomaml_plus_plus(learner: TaskLearner) -> None:
    """Starts the mean of the inner gradients."""
    learner.memory = {"gradient": torch.zeros_like(learner.theta), "steps": learner.theta.new_zeros(())}


def observe_fomaml_plus_plus(learner: TaskLearner) -> None:
    """Adds grad L_k(theta_(k-1)) without the optimizer's weight decay."""
    learner.memory["gradient"] += _spent_gradient(learner)
    learner.memory["steps"] += 1


def fomaml_plus_plus(learner: TaskLearner, phi: Tensor) -> Tensor:
    """The mean of the inner gradients at theta_0 .. theta_(K-1) [N]: MAML++'s multi-step loss, to first order.

    MAML++ takes the losses at theta_1 .. theta_K, with weights that start at 1/K (Antoniou et al., 2018, section 4).
    Here theta_0 stands for theta_K, because the gradients at theta_0 .. theta_(K-1) are those of the inner steps and
    cost nothing; the two means differ by 1/K of one gradient's change along the episode. The weights 1/K keep the sum
    on FOMAML's scale. With plain SGD this is (phi - theta_K) / (alpha K), Reptile on another scale, and its beta is
    alpha K times Reptile's; momentum and weight decay part the two. (The released code names no FOMAML++. A FOMAML
    update in every inner step without a shift is no_shifting with meta_gradient=fomaml.)
    """
    return torch.div(learner.memory["gradient"], learner.memory["steps"], out=_spent_gradient(learner))


def begin_imaml(learner: TaskLearner) -> None:
    """Keeps phi, the centre of the proximal term.

    Raises:
        ValueError: several ranks share the task: no second derivative passes through a synchronised batch norm.
    """
    if learner.data_group is not None:
        raise ValueError(
            f"algorithm=imaml: {learner.data_group.size()} ranks share task {learner.name}, and its Hessian-vector "
            "products need the whole batch on one; start at most one rank a task"
        )
    learner.memory = {"phi": learner.theta.clone()}


def observe_imaml(learner: TaskLearner, options: IMAMLConfig) -> None:
    """Adds the gradient of the proximal term, lambda (theta - phi)."""
    if options.proximal:
        _spent_gradient(learner).add_(learner.theta - learner.memory["phi"], alpha=options.lam)


def imaml(learner: TaskLearner, phi: Tensor, options: IMAMLConfig, batch: GradientBatch = "last") -> Tensor:
    """(I + H / lambda)^-1 grad L(theta_K) [N], by conjugate gradient (Rajeswaran et al., 2019, Lemma 1).

    H is the Hessian of the last inner batch's loss in the body, the head held fixed. It follows from the stationarity
    of L + lambda/2 ||theta - phi||^2, hence the proximal term; the paper's results come from code without it.
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


def hessian_operator(learner: TaskLearner, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
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
    """x with `matrix`(x) = b [N], for a symmetric positive `matrix`; no value goes back to the host.

    Ends early where a direction has no positive curvature, as the Hessian of a network may have; where already the
    first has none, x = b.
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
    """Starts the sum over the path's segments."""
    learner.memory = {"sum": torch.zeros_like(learner.theta)}


def observe_leap(learner: TaskLearner, options: LeapConfig) -> None:
    """Adds the segment that ends in (theta_(k-1), its loss), and keeps this point for the next one.

    A point's loss and gradient are those of its own batch. (The released code looks after the update and so pairs each
    loss with the parameters one step later; Leap's authors look before it, as here.)
    """
    memory, loss = learner.memory, learner.group_mean(learner.loss.clone())
    point = learner.flat.vector if options.head else learner.theta
    if "loss" in memory:
        rise = loss - memory["loss"]
        memory["sum"] += leap_segment(memory["point"], point, memory["gradient"], rise, options)
    gradient = _spent_gradient(learner)
    learner.memory = {"sum": memory["sum"], "point": point.clone(), "gradient": gradient.clone(), "loss": loss}


def leap_segment(start: Tensor, end: Tensor, gradient: Tensor, rise: Tensor, options: LeapConfig) -> Tensor:
    """The pull of a path's segment on phi [N], with the trajectory's Jacobian taken as I, as Leap takes it.

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
        pull = pull / square.sqrt().clamp_min(torch.finfo(square.dtype).tiny)  # a standstill pulls nowhere
    return pull


def leap(learner: TaskLearner, phi: Tensor) -> Tensor:
    """The gradient [N] of the length of the path theta_0 .. theta_(K-1) (Flennerhag et al., 2018).

    It has K - 1 segments: theta_K, whose loss no inner step computes, is not a point of it.
    """
    return _spent_gradient(learner).copy_(learner.memory["sum"])


def _spent_gradient(learner: TaskLearner) -> Tensor:
    return learner.flat.grad[: learner.theta.numel()]
