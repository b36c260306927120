"""Delayed CTS for many delays and betas at once, from the same initialization on the same batches.

The loop of dist_cts/meta_train.py with a leading dimension V of variants, whose gradients one vectorized call computes:
for networks so small that the calls cost more than the arithmetic. A test compares it with a run.
"""

import contextlib
import io
import math
from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, replace_all_batch_norm_modules_, vmap

from dist_cts.distributed.placement import place
from dist_cts.distributed.process_group import process_group
from dist_cts.learner import TaskLearner
from dist_cts.run.build import build_learners, initial_phi
from dist_cts.run.config import TrainConfig

CPU = torch.device("cpu")


class Variant(NamedTuple):
    """`crossing`: meta-updates in flight at the end of an episode are applied in the next one, not before it."""

    beta: float
    delay: int
    crossing: bool = False


class Task:
    """A task's theta and head [V, N + H] of all variants, with their momentum."""

    def __init__(self, learner: TaskLearner, variants: int) -> None:
        self.learner, self.body = learner, learner.theta.numel()
        self.vectors = learner.flat.vector.repeat(variants, 1)
        self.momentum = torch.zeros_like(self.vectors)
        model, slots = learner.model, learner.flat.layout.slots
        replace_all_batch_norm_modules_(model)  # no running statistics: training does not read them

        def loss(vector: Tensor, images: Tensor, labels: Tensor) -> Tensor:
            parts = {s.name: vector[s.offset : s.offset + math.prod(s.shape)].view(s.shape) for s in slots}
            return nn.functional.cross_entropy(functional_call(model, parts, images), labels)

        self.differentiate = vmap(grad_and_value(loss), in_dims=(0, None, None))

    def step(self) -> Tensor:
        """An inner step of every variant; the losses [V] before it."""
        inner = self.learner.inner
        with torch.enable_grad():
            gradient, loss = self.differentiate(self.vectors, *self.learner.next_batch())
        self.momentum.mul_(inner.momentum).add_(gradient).add_(self.vectors, alpha=inner.weight_decay)
        self.vectors.sub_(self.momentum, alpha=inner.lr)
        return loss


@torch.no_grad()
def meta_train_variants(config: TrainConfig, variants: list[Variant]) -> tuple[list[dict[str, Tensor]], Tensor]:
    """phi by name, and the mean training loss of the last episode [V], of every variant; plain momentum SGD."""
    count, K = len(variants), config.inner_steps
    with process_group(CPU, 60), contextlib.redirect_stderr(io.StringIO()):
        learners = build_learners(config, place(len(config.tasks), 1, 0), CPU)
        layout = learners[0].flat.body_layout
        phi = initial_phi(config, learners[0].flat, CPU)[0].repeat(count, 1)
    tasks, late = [Task(learner, count) for learner in learners], [deque[tuple[int, Tensor]]() for _ in variants]
    for m in range(config.episodes):
        losses = torch.zeros(count)
        for task in tasks:
            task.vectors[:, : task.body] = phi
        for k in range(1, K + 1):
            losses += sum(task.step() for task in tasks) / len(tasks) / K
            thetas = [task.vectors[:, : task.body] for task in tasks]
            step, last = m * K + k, m == config.episodes - 1
            for v, (beta, delay, crossing) in enumerate(variants):
                late[v].append((step, beta * (sum(theta[v] for theta in thetas) / len(tasks) - phi[v])))
                while late[v] and (late[v][0][0] + delay <= step or (k == K and (last or not crossing))):
                    _, delta = late[v].popleft()
                    for vector in (phi, *thetas):
                        vector[v] += delta
    return [{name: view.clone() for name, view in layout.views(phi[v]).items()} for v in range(count)], losses
