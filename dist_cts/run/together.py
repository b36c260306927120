"""Adaptations that take their steps together: one vectorized gradient and one update for all of them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import tree_map

from dist_cts.learner import TaskLearner
from dist_cts.models import SeededMasks
from dist_cts.optimizer import make_optimizer, update


class Together:
    """S learners of one model on batches of one shape, as a single learner.

    Each learner's trajectory is the one that it takes alone, up to rounding: every rule of the inner optimizer is
    elementwise or acts on one row of the stacked parameters [S, N + H].

    Raises:
        ValueError: the model draws random numbers.
    """

    def __init__(self, learners: Sequence[TaskLearner]) -> None:
        self.learners, first = learners, learners[0]
        if isinstance(first.masks, SeededMasks):
            raise ValueError("together: the model draws random numbers, such as dropout's masks; set together=1")
        self.parameter = nn.Parameter(torch.stack([learner.flat.vector for learner in learners]))
        self.parameter.grad = torch.zeros_like(self.parameter)
        self.optimizer = make_optimizer([self.parameter], first.inner)
        self._trained, self._grads = self._views(self.parameter.detach()), self._views(self.parameter.grad)
        # Buffers, which forward passes change, and frozen parameters.
        self._others = {
            name: torch.stack([learner.model.get_buffer(name) for learner in learners])
            for name, _ in first.model.named_buffers()
        } | {
            name: torch.stack([learner.model.get_parameter(name).detach() for learner in learners])
            for name, _ in first.model.named_parameters()
            if name not in self._trained
        }

        def loss(trained: dict[str, Tensor], others: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
            outputs = first.forward(inputs, lambda x: functional_call(first.model, (trained, others), (x,)))
            return first.criterion.function(outputs, targets)

        self._gradient = vmap(grad(loss))

    def inner_step(self) -> None:
        """The next inner step of every learner.

        Raises:
            ValueError: torch.func cannot vectorize the model or its loss.
        """
        batches = [learner.next_batch() for learner in self.learners]
        inputs, targets = tree_map(lambda *tensors: torch.stack(tensors), *batches)
        try:
            gradients = self._gradient(self._trained, self._others, inputs, targets)
        except RuntimeError as error:
            if "vmap" not in str(error):
                raise
            raise ValueError(
                f"together: the model or its loss: {str(error).splitlines()[0]}; set together=1"
            ) from error
        torch._foreach_copy_(list(self._grads.values()), [gradients[name] for name in self._grads])
        first = self.learners[0]
        update(self.optimizer, self.parameter, first.inner, self.parameter.detach()[:, : len(first.theta)])

    @torch.no_grad()
    def write_back(self) -> None:
        """Copies parameters and buffers into the learners."""
        for index, learner in enumerate(self.learners):
            learner.flat.vector.copy_(self.parameter[index])
            for name, buffer in learner.model.named_buffers():
                buffer.copy_(self._others[name][index])

    def _views(self, stack: Tensor) -> dict[str, Tensor]:
        """The named tensors [S, ...] inside `stack` [S, N + H], sharing its memory."""
        count, length = stack.shape
        return {
            slot.name: stack.as_strided((count, *slot.shape), (length, *slot.stride), slot.offset)
            for slot in self.learners[0].flat.layout.slots
        }
