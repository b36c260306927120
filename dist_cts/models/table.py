"""The table of models, and models of torchvision and timm by name: how each is built and which part is its head."""

import difflib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from dist_cts.config import Config
from dist_cts.flat import Parts
from dist_cts.models import from_timm, from_torchvision
from dist_cts.models.head import find_head
from dist_cts.models.lora import LoraConfig, add_lora
from dist_cts.models.parts import Patterns, Treatment, split
from dist_cts.models.small_resnet import SmallResNet
from dist_cts.models.tiny import Tiny
from dist_cts.registry import OWN
from dist_cts.seeds import hashed_seed


class ModelConfig(Config):
    """The network, and which of its parameters phi covers; by default all but the head, which each task has itself."""

    name: str = Field(
        "resnet20", description="resnet20, resnet8, resnet18, resnet34, tiny, torchvision:NAME or timm:NAME"
    )
    width: float = Field(1.0, gt=0, le=8, description="factor on the channels: resnet20, resnet8 16/32/64; tiny 8/16")
    args: dict[str, Any] = Field({}, description="further keyword arguments of the model's constructor")
    body: Patterns | None = Field(
        None, min_length=1, description="what phi covers: patterns of parameter names, or norm, head, lora; -X excludes"
    )
    rest: Treatment = Field("frozen", description="what belongs neither to phi nor to the head: frozen or private")
    head: Treatment = Field("private", description="the head, unless phi covers it: private or frozen")
    lora: LoraConfig | None = Field(None, description="low-rank adapters {rank, alpha, patterns}; phi covers them")


@dataclass(frozen=True)
class Architecture:
    """A row of the table of models.

    `build` takes the number of classes C and the keyword arguments of `model.args`. `head` names the submodule that
    produces the C outputs; None: what the model's `get_classifier` returns, or else its last linear layer.
    `pretrained` takes a tag and the same arguments, and returns a state dict or the file of one.
    """

    build: Callable[..., nn.Module]
    head: str | None = None
    pretrained: Callable[..., Path | dict[str, Tensor]] | None = None
    reserved: frozenset[str] = frozenset()  # arguments that are not the user's to set


def _of(library: ModuleType, name: str) -> Architecture:
    return Architecture(
        partial(library.build, name), pretrained=partial(library.pretrained, name), reserved=library.RESERVED
    )


LIBRARIES = {"torchvision": from_torchvision, "timm": from_timm}
MODELS = {
    "resnet20": Architecture(SmallResNet),
    "resnet8": Architecture(partial(SmallResNet, depth=1)),
    "resnet18": _of(from_torchvision, "resnet18"),
    "resnet34": _of(from_torchvision, "resnet34"),
    "tiny": Architecture(Tiny),
}


def find_architecture(name: str) -> Architecture:
    """The row of MODELS, or the model of torchvision or timm, that `model.name` names.

    Raises:
        ValueError: unknown name; the message has the nearest known ones.
        ImportError: timm is not installed; the message has the command that installs it.
    """
    if name in MODELS:
        return MODELS[name]
    prefix, _, full = name.partition(":")
    if prefix not in LIBRARIES:
        known = {other: other for other in MODELS} | {n: f"torchvision:{n}" for n in from_torchvision.names()}
        near = [known[other] for other in difflib.get_close_matches(name, known, n=3)]
        hint = f"; nearest: {', '.join(near)}" if near else ""
        known = ", ".join([*MODELS, "torchvision:NAME", "timm:NAME"])
        raise ValueError(f"model.name={name!r}: choose one of {known}{hint}; {OWN}")
    library, known = LIBRARIES[prefix], LIBRARIES[prefix].names()
    architecture, _, tag = full.partition(".")
    if architecture not in known or (tag and library is not from_timm):
        near = ", ".join(f"{prefix}:{other}" for other in difflib.get_close_matches(full, known, n=3, cutoff=0))
        raise ValueError(f"model.name={name!r}: {prefix} has no such model; nearest: {near}")
    if tag:
        from_timm.check_tag(architecture, tag)
    return _of(library, full)


def build(config: ModelConfig, classes: int, *seed: int | str) -> tuple[nn.Module, Parts]:
    """A model for C classes whose weights depend only on the keys of the seed, and what phi leaves out of it.

    Frozen parameters do not require a gradient.

    Raises:
        ValueError: unknown model name or argument, or patterns that do not fit the model.
        ImportError: the library of the model is not installed.
    """
    architecture = find_architecture(config.name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(hashed_seed(*seed))
        model = _construct(config, architecture, classes)
        try:
            head = find_head(model, classes) if architecture.head is None else (architecture.head,)
        except ValueError as error:
            if config.body is None:
                raise ValueError(f"model.name={config.name}: its head cannot be found: {error}") from None
            head = ()  # patterns say what phi covers
        if config.lora is not None:
            add_lora(model, config.lora, head)
    return model, split(model, head, classes, config.body, rest=config.rest, head=config.head)


def pretrained(config: ModelConfig, weights: str) -> Path | dict[str, Tensor]:
    """Pretrained weights of the configured model: `pretrained`, or a tag that it has; a state dict, or the file of one.

    Raises:
        ValueError: the model has no such weights.
        OSError: they cannot be downloaded.
    """
    architecture = find_architecture(config.name)
    if architecture.pretrained is None:
        raise ValueError(f"init={weights}: not a file (.safetensors, .pt, .pth), and {config.name} has no such weights")
    return architecture.pretrained(weights, **_arguments(config))


def _arguments(config: ModelConfig) -> dict[str, Any]:
    return config.args | ({"width": config.width} if config.width != 1 else {})


def _construct(config: ModelConfig, architecture: Architecture, classes: int) -> nn.Module:
    name, args = config.name, _arguments(config)
    if reserved := architecture.reserved & args.keys():
        raise ValueError(f"model.args.{min(reserved)}: set by the task or by `init`; remove it")
    try:
        return architecture.build(classes, **args)
    except ImportError:
        raise
    except Exception as error:  # a constructor may raise anything
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown is None or unknown[1] not in args:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise ValueError(f"model.args={config.args}: {name} cannot be built with them ({reason})") from error
        if unknown[1] not in config.args:
            raise ValueError(f"model.width={config.width}: {name} has a fixed width; set model.width=1") from None
        known = keywords(architecture, classes)
        near = difflib.get_close_matches(unknown[1], known, n=3, cutoff=0.4) or known
        raise ValueError(f"model.args.{unknown[1]}: {name} has no such argument; nearest: {', '.join(near)}") from None


def keywords(architecture: Architecture, classes: int = 2) -> list[str]:
    """The keyword arguments that can be set by `model.args`: of the function that builds it, or of its class."""
    found = inspect.signature(architecture.build).parameters
    if "args" in found:  # of a library: the constructor of what it builds has the names
        found = inspect.signature(type(architecture.build(classes))).parameters
    takes = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    names = [name for name, parameter in found.items() if parameter.kind in takes]
    return [name for name in names if name not in {"classes", "width", *architecture.reserved}]
