"""Models, one row of MODELS each: a body that phi initializes, and a classifier head per task that phi leaves out."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from pydantic import Field
from torch import Tensor, nn

from dist_cts.config import Config
from dist_cts.seeds import hashed_seed


class ModelConfig(Config):
    """The body; every task has its own head."""

    name: str = Field("resnet20", description="resnet20, resnet8, resnet18, resnet34 or tiny")
    width: float = Field(1.0, gt=0, le=8, description="factor on the channels: resnet20, resnet8 16/32/64; tiny 8/16")


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a parameter-free shortcut: every second pixel, new channels zero (option A)."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.extra = stride, channels - channels_in

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1 or self.extra:
            x = x[:, :, :: self.stride, :: self.stride]
            x = nn.functional.pad(x, (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2))
        return torch.relu(out + x)


class SmallResNet(nn.Module):
    """A ResNet for small images (He et al., 2016, section 4.2): 3 stages of `depth` blocks, width x 16/32/64 channels.

    ResNet20 has three blocks per stage, ResNet8 one.
    """

    def __init__(self, classes: int, width: float = 1.0, depth: int = 3) -> None:
        super().__init__()
        stages = [max(1, round(channels * width)) for channels in (16, 32, 64)]
        self.conv1 = nn.Conv2d(3, stages[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(stages[0])
        blocks, channels_in = [], stages[0]
        for stage, channels in enumerate(stages):
            for block in range(depth):
                blocks.append(BasicBlock(channels_in, channels, 2 if stage and not block else 1))
                channels_in = channels
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(channels_in, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] to logits [B, classes]; H and W of any size from 4 up."""
        x = self.blocks(torch.relu(self.bn1(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


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


def _torchvision(name: str) -> Callable[[int, float], nn.Module]:
    def build(classes: int, width: float) -> nn.Module:
        if width != 1:
            raise ValueError(f"model.width={width}: {name} has a fixed width; set model.width=1")
        import torchvision  # as slow to import as torch itself, and most runs do not need it

        return torchvision.models.get_model(name, num_classes=classes)

    return build


@dataclass(frozen=True)
class Architecture:
    """A row of the table of models: how to build it for C classes, and the name of its head."""

    build: Callable[[int, float], nn.Module]
    head: str = "fc"


MODELS = {
    "resnet20": Architecture(SmallResNet),
    "resnet8": Architecture(partial(SmallResNet, depth=1)),
    "resnet18": Architecture(_torchvision("resnet18")),
    "resnet34": Architecture(_torchvision("resnet34")),
    "tiny": Architecture(Tiny),
}


def build(config: ModelConfig, classes: int, *seed: int | str) -> tuple[nn.Module, str]:
    """A model whose weights depend only on the keys of the seed, and the name of its head.

    Raises:
        ValueError: unknown model name.
    """
    if config.name not in MODELS:
        raise ValueError(f"model.name={config.name!r}: choose one of {', '.join(MODELS)}")
    architecture = MODELS[config.name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(hashed_seed(*seed))
        return architecture.build(classes, config.width), architecture.head
