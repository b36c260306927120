"""Low-rank adapters (LoRA; Hu et al., 2022): W is read as W + alpha / rank * up @ down, in layers of any kind."""

import functools
from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor, nn

from dist_cts.config import Config
from dist_cts.models.parts import ADAPTERS, Patterns, select, words_of


class LoraConfig(Config):
    """Low-rank adapters of a model's weights; unless `model.body` says otherwise, phi covers them alone."""

    rank: int = Field(8, gt=0, description="r, at most the smaller side of each weight matrix")
    alpha: float = Field(8, gt=0, description="the adapters' scale is alpha / rank")
    patterns: Patterns = Field(
        ["-head"], min_length=1, description="adapted weights of linear, convolution and attention layers"
    )


def add_lora(model: nn.Module, config: LoraConfig, head_modules: tuple[str, ...]) -> None:
    """Adds `NAME_lora_down` [r, I] and `NAME_lora_up` [O, r] beside each adapted weight NAME, of shape [O, ...].

    I is the product of the weight's other sides: a convolution's kernel is a matrix [O, I], as in the authors' code.
    `down` starts random, `up` at zero, so that the outputs start unchanged. Other parameters keep their names.

    Raises:
        ValueError: a pattern matches no weight.
    """
    layers = nn.Linear | nn.modules.conv._ConvNd | nn.MultiheadAttention
    weights = {
        name: module
        for module_name, module in model.named_modules()
        if isinstance(module, layers)
        for name, parameter in module.named_parameters(module_name, recurse=False)
        if parameter.ndim >= 2 and name.endswith("weight")
    }
    words = words_of(model, head_modules)
    chosen = select(config.patterns, weights, words, start=weights, key="model.lora.patterns") & weights.keys()
    adapted: dict[nn.Module, list[str]] = {}
    for full_name, module in weights.items():
        if full_name in chosen:
            adapted.setdefault(module, []).append(full_name.rpartition(".")[2])
    for module, names in adapted.items():
        for name in names:
            weight = module._parameters[name]
            outputs, inputs = len(weight), weight[0].numel()
            rank = min(config.rank, outputs, inputs)
            down = weight.new_empty(rank, inputs)
            nn.init.kaiming_uniform_(down, a=5**0.5)
            module.register_parameter(f"{name}_lora_down", nn.Parameter(down))
            module.register_parameter(f"{name}_lora_up", nn.Parameter(weight.new_zeros(outputs, rank)))
        module.lora_scale = config.alpha / config.rank
        module.__class__ = _adapted(type(module), tuple(names))


def with_adapters(own: Mapping[str, Tensor], loaded: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """`loaded` tensors, with a model's own adapters where they have none: pretrained weights.

    Raises:
        ValueError: they have adapters that the model lacks; names `source`.
    """
    if lost := {name for name in loaded if name.endswith(ADAPTERS)} - own.keys():
        raise ValueError(f"{source} holds adapters such as {min(lost)}; set model.lora as in the run that wrote it")
    return {name: value for name, value in own.items() if name.endswith(ADAPTERS)} | dict(loaded)


@functools.cache
def _adapted(kind: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """A subclass of a layer that reads its weights with their adapters added.

    The weights stay in the module's table of parameters, so names, devices and state dicts are as before; attention
    layers and convolutions of any library, which read `weight` themselves, are adapted as well.
    """

    def reader(name: str) -> property:
        def read(self: nn.Module) -> Tensor:
            parameters = self._parameters
            update = torch.mm(parameters[f"{name}_lora_up"], parameters[f"{name}_lora_down"])
            return parameters[name] + self.lora_scale * update.view(parameters[name].shape)

        return property(read)

    return type(kind.__name__, (kind,), {name: reader(name) for name in names})
