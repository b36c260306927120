"""A learner whose loss is 1/2 sum a (theta - c)^2, so that everything has a closed form."""

import torch
from torch import nn

from dist_cts.learner import InnerConfig, TaskLearner
from dist_cts.losses import Loss

ALPHA = 0.1
PLAIN = InnerConfig(optimizer="sgd", lr=ALPHA, momentum=0, weight_decay=0)


class Quadratic(nn.Module):
    """Parameters w [n], the body, and fc [h], the head; the output is (w, fc) - c."""

    def __init__(self, body, head=0):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(body))
        if head:
            self.fc = nn.Parameter(torch.zeros(head))

    def forward(self, c):
        return torch.cat([p for p in self.parameters()]) - c


def quadratic(residual, a):
    return 0.5 * (a * residual**2).sum()


class ListBatches:
    """(c, a) of each step, the last one repeats."""

    def __init__(self, batches):
        self.batches, self.step, self.wait_seconds = batches, 0, 0.0

    def next(self):
        self.step += 1
        return self.batches[min(self.step, len(self.batches)) - 1]

    def seek(self, step):
        self.step = step


def make_learner(batches, head=0, inner=PLAIN, **options):
    """The learner whose n + head curvatures and centres are those of the batches [(c, a), ...]."""
    model = Quadratic(len(batches[0][0]) - head, head)
    name = "fc" if head else None
    return TaskLearner("q", model, name, ListBatches(batches), inner, criterion=Loss(quadratic), **options)


def phi_of(learner, values):
    """phi [N] with the values in its one tensor."""
    phi = torch.zeros_like(learner.theta)
    phi[: len(values)] = torch.as_tensor(values)
    return phi


def named(learner, vector):
    """The values of w in a vector [N]."""
    return learner.flat.body_layout.views(vector)["w"]
