"""Classifiers of torchvision by name; torchvision is as slow to import as torch itself, hence late."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

RESERVED = frozenset({"num_classes", "weights", "weights_backbone"})  # these follow from the task and from `init`


def names() -> list[str]:
    """The classifiers that torchvision has."""
    import torchvision

    return torchvision.models.list_models(module=torchvision.models)


def build(name: str, classes: int, **args: Any) -> nn.Module:
    """torchvision's classifier `name` with random weights."""
    import torchvision

    return torchvision.models.get_model(name, num_classes=classes, **args)


def pretrained(name: str, weights: str, **args: Any) -> Path:
    """The file of a classifier's pretrained weights: `pretrained` for torchvision's default, or IMAGENET1K_V1, ...

    Raises:
        ValueError: the classifier has no such weights.
        OSError: they cannot be downloaded.
    """
    import torchvision

    known = torchvision.models.get_model_weights(name).__members__
    if weights != "pretrained" and weights not in known:
        raise ValueError(f"init={weights}: torchvision:{name} has the weights {', '.join(['pretrained', *known])}")
    found = known["DEFAULT" if weights == "pretrained" else weights]
    return _downloaded(found.url, str(found))


def weights_file(weights: str) -> Path:
    """The file of any pretrained weights of torchvision, such as ResNet18_Weights.IMAGENET1K_V1.

    Raises:
        ValueError: unknown weights.
        OSError: they cannot be downloaded.
    """
    import torchvision

    try:
        url = torchvision.models.get_weight(weights).url
    except (ValueError, KeyError):
        known = "for example ResNet18_Weights.IMAGENET1K_V1"
        raise ValueError(f"torchvision has no weights {weights}; see torchvision.models.list_models, {known}") from None
    return _downloaded(url, weights)


def _downloaded(url: str, weights: str) -> Path:
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        sha256 = path.stem.rpartition("-")[2]  # the file name contains its first digits
        try:
            torch.hub.download_url_to_file(url, str(path), sha256, progress=False)
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:160]
            raise OSError(f"{weights} cannot be downloaded ({reason}); download {url} to {path.parent}") from None
    return path
