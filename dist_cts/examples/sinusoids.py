"""Sinusoid regression, MAML's first experiment (Finn et al., 2017, section 5.1).

A task is one sinusoid, of random amplitude and phase: y = A sin(x - phase), A in [0.1, 5], phase in [0, pi], x in
[-5, 5]. Meta-training has many tasks with 100 points each; a held-out sinusoid is learned from ten points.
"""

from functools import partial
from math import pi

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from dist_cts.data.datasets import DATASETS
from dist_cts.models import MODELS, Architecture
from dist_cts.seeds import hashed_seed

TASKS, TARGETS = 16, 4


class Sinusoid(TensorDataset):
    """Points (x, y) of one sinusoid, float32 [1] each."""

    classes = 1

    def __init__(self, name: str, train_points: int, split: str) -> None:
        generator = torch.Generator().manual_seed(hashed_seed("sinusoid", name))
        amplitude, phase = 0.1 + 4.9 * torch.rand((), generator=generator), pi * torch.rand((), generator=generator)
        train = 10 * torch.rand(train_points, 1, generator=generator) - 5
        x = train if split == "train" else torch.linspace(-5, 5, 200)[:, None]
        super().__init__(x, amplitude * torch.sin(x - phase))
        self.fingerprint = f"amplitude {amplitude:.6f} phase {phase:.6f}"


class Regressor(nn.Module):
    """MAML's network: two hidden layers of width x 40 units."""

    def __init__(self, outputs: int, width: float = 1.0) -> None:
        super().__init__()
        units = round(40 * width)
        self.body = nn.Sequential(nn.Linear(1, units), nn.ReLU(), nn.Linear(units, units), nn.ReLU())
        self.fc = nn.Linear(units, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, 1] to y [B, outputs]."""
        return self.fc(self.body(x))


for number in range(TASKS):
    DATASETS[f"sinusoid-{number}"] = partial(Sinusoid, f"sinusoid-{number}", 100)
for number in range(TARGETS):
    DATASETS[f"target-{number}"] = partial(Sinusoid, f"target-{number}", 10)
MODELS["regressor"] = Architecture(Regressor, head="fc")
