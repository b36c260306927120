"""The classifier head of a model: the modules that produce its C outputs."""

from torch import nn


def find_head(model: nn.Module, outputs: int) -> tuple[str, ...]:
    """The names of the head's modules: what timm's `get_classifier` returns, or else the last linear or 2D convolution.

    Raises:
        ValueError: there is none, or the last one does not have `outputs` outputs.
    """
    modules = dict(model.named_modules())
    if hasattr(model, "get_classifier"):
        head = model.get_classifier()
        layers = list(head) if isinstance(head, list | tuple | nn.ModuleList) else [head]
        found = [name for name, module in modules.items() if any(module is layer for layer in layers)]
    else:
        found = [name for name, module in modules.items() if isinstance(module, nn.Linear | nn.Conv2d)][-1:]
    for name in found:
        weight = getattr(modules[name], "weight", None)
        if weight is None or len(weight) != outputs:
            raise ValueError(f"its last layer {name} ({modules[name]}) does not have {outputs} outputs")
    if not found:
        raise ValueError("it has no linear layer that could be its head")
    return tuple(found)
