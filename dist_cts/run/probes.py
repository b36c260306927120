"""Meta-test of frozen features: what a body computes without being trained on the target."""

import math
from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from dist_cts.data.datasets import DatasetBatches
from dist_cts.learner import Batch, TaskLearner
from dist_cts.losses import Loss

Protocol = Literal["fine-tune", "linear-probe", "knn"]
NEIGHBORS, TEMPERATURE = 20, 0.07  # DINO's (Caron et al., 2021)
CALIBRATION = 100  # training batches, at most, for batch norm's running statistics, which are no part of phi


def head_of(learner: TaskLearner) -> nn.Module:
    """The head of the learner's model, whose inputs are the features.

    Raises:
        ValueError: it does not have exactly one.
    """
    found = {name.rpartition(".")[0] for name in learner.flat.parts.head}
    if len(found) != 1:
        raise ValueError(f"protocol: the model has {len(found)} heads ({', '.join(sorted(found))}); use fine-tune")
    return learner.model.get_submodule(found.pop())


class Features:
    """A split as the inputs [N, F] of the head, with its targets [N, ...]."""

    def __init__(self, learner: TaskLearner, head: nn.Module, batches: Iterable[Batch]) -> None:
        inputs, targets = [], []
        hook = head.register_forward_pre_hook(lambda _, args: inputs.append(args[0].float().flatten(1).clone()))

        def observed() -> Iterator[Batch]:
            for batch in batches:
                targets.append(batch[1])
                yield batch

        learner.evaluate(observed())
        hook.remove()
        self.inputs, self.targets = torch.cat(inputs), torch.cat(targets)

    def test_batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Every sample once, in order."""
        return zip(self.inputs.split(size), self.targets.split(size), strict=True)


@torch.no_grad()
def calibrate(learner: TaskLearner, samples: int, batch_size: int) -> None:
    """Sets batch norm's running statistics to their mean over the learner's next training batches, at most an epoch."""
    norms = [module for module in learner.model.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]
    norms = [module for module in norms if module.track_running_stats]
    if not norms:
        return
    learner.model.eval()
    for module in norms:
        module.train()
        module.reset_running_stats()
        module.momentum = None  # the mean over all batches
    for _ in range(min(math.ceil(samples / batch_size), CALIBRATION)):
        learner.model(learner.next_batch()[0])


def linear_probe(learner: TaskLearner, head: nn.Module, train: Features, seed: int, batch_size: int) -> TaskLearner:
    """A learner of the head alone, on the features of the training split."""
    dataset = TensorDataset(train.inputs.cpu(), train.targets.cpu())
    batches = DatasetBatches(dataset, learner.name, seed, batch_size, device=train.inputs.device)
    head.requires_grad_(True)
    return TaskLearner(learner.name, head, None, batches, learner.inner, criterion=learner.criterion)


def nearest_neighbors(train: Features, test: Features, classes: int, loss: Loss) -> dict[str, float]:
    """Loss and metric on the test split of the votes of each sample's nearest training samples by cosine similarity.

    A neighbor of similarity s votes with weight exp(s / TEMPERATURE).

    Raises:
        ValueError: the targets are not classes.
    """
    if train.targets.is_floating_point() or train.targets.ndim != 1:
        raise ValueError("protocol=knn needs classes as targets; use linear-probe or fine-tune")
    known, votes = F.normalize(train.inputs), []
    for inputs in F.normalize(test.inputs).split(256):
        similarity, index = (inputs @ known.T).topk(min(NEIGHBORS, len(known)))
        weights = (similarity / TEMPERATURE).softmax(1)
        votes.append(weights.new_zeros(len(inputs), classes).scatter_add_(1, train.targets[index], weights))
    outputs = torch.cat(votes).clamp(min=1e-6).log()
    result = {"loss": float(loss.function(outputs, test.targets))}
    if (metric := loss.metric) is not None:
        result[metric.name] = metric.finish(float(metric.function(outputs, test.targets)))
    return result
