"""A network of two convolutions, for tests."""

import torch
from torch import Tensor, nn


class Tiny(nn.Module):
    """Two strided convolutions with batch norm, for tests."""

    def __init__(self, classes: int, width: float = 1.0) -> None:
        super().__init__()
        first, second = (max(1, round(channels * width)) for channels in (8, 16))
        self.conv1 = nn.Conv2d(3, first, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.conv2 = nn.Conv2d(first, second, 3, 2, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(second)
        self.fc = nn.Linear(second, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] to logits [B, classes]."""
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return self.fc(x.mean((2, 3)))
