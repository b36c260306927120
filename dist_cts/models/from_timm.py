"""Models of timm by name, with an optional tag of pretrained weights: resnet18, vit_tiny_patch16_224.augreg_in21k."""

import difflib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

# Keywords that follow from the task and from `init`, read files, or give other outputs than logits.
RESERVED = frozenset(
    {"num_classes", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}
    | {"features_only"}
)


def names() -> list[str]:
    """The models that timm has, without tags."""
    return _timm().list_models()


def build(name: str, classes: int, **args: Any) -> nn.Module:
    """timm's model `name` with random weights; a tag decides only which weights `pretrained` loads."""
    return _timm().create_model(name, num_classes=classes, **args)


def pretrained(name: str, weights: str, **args: Any) -> dict[str, Tensor]:
    """The tensors of pretrained weights, fitted by timm to `args` (in_chans, img_size): `pretrained`, or a tag.

    Raises:
        ValueError: the model has no such weights.
        OSError: they cannot be downloaded.
    """
    tag = name.partition(".")[2] if weights == "pretrained" else weights
    architecture = name.partition(".")[0]
    check_tag(architecture, tag)
    try:
        with torch.random.fork_rng(devices=[]):
            model = _timm().create_model(f"{architecture}.{tag}" if tag else architecture, pretrained=True, **args)
    except Exception as error:  # of its hub, its network library, or a damaged file
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise OSError(f"init={weights}: timm cannot load the weights of {name} ({reason})") from None
    return model.state_dict()


def check_tag(architecture: str, tag: str) -> None:
    """Raises ValueError with the nearest tags if timm has no weights `tag` of the architecture; '' is its default."""
    tags = [known.partition(".")[2] for known in _timm().list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        near = difflib.get_close_matches(tag, tags, n=5, cutoff=0) or ["none"]
        raise ValueError(f"timm:{architecture} has no weights {tag!r}; nearest: {', '.join(near)}")


def _timm() -> ModuleType:
    try:
        import timm
    except ImportError:
        raise ImportError("model.name=timm:... needs the package timm: pip install 'dist_cts[timm]'") from None
    return timm
