"""Whether a model runs on a task's inputs, and on which images it would if it does not: before the first step."""

from typing import Any

import torch
from torch import Tensor, nn

from dist_cts.models.masks import generators
from dist_cts.models.table import ModelConfig, find_architecture, keywords

SIZES = (8, 16, 24, 28, 32, 48, 64, 84, 96, 112, 128, 160, 192, 224, 240, 256, 288, 299, 320, 384, 448, 512)


def check_model(config: ModelConfig, model: nn.Module, inputs: Any, outputs: int, task: str) -> bool:
    """Runs the model once in training mode, on the inputs of two examples; returns whether it draws random numbers.

    Raises:
        ValueError: it does not run on these inputs, with their size and one that fits; or, for images [2, C, H, W], it
            does not return [2, `outputs`].
    """
    try:
        found, draws = try_forward(model, inputs)
    except Exception as error:  # a model may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        remedy = _remedy(config, model, inputs)
        raise ValueError(
            f"model.name={config.name} does not run on task {task}, {_describe(inputs)}{remedy} ({reason})"
        ) from None
    if _is_images(inputs) and getattr(found, "shape", None) != (2, outputs):
        shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        hint = "; set model.args.aux_logits=false" if hasattr(model, "aux_logits") else ""
        raise ValueError(f"model.name={config.name} returns {shape} for 2 images, expected [2, {outputs}]{hint}")
    return draws


@torch.no_grad()
def try_forward(model: nn.Module, inputs: Any) -> tuple[Any, bool]:
    """The outputs, and whether the model drew random numbers; its buffers and the generators stay as they were."""
    kept = [buffer.clone() for buffer in model.buffers()]
    sources = generators(next(model.parameters()).device)
    states = [generator.get_state() for generator in sources]
    try:
        outputs = model(inputs)
        return outputs, any(not torch.equal(g.get_state(), state) for g, state in zip(sources, states, strict=True))
    finally:
        for buffer, value in zip(model.buffers(), kept, strict=True):
            buffer.copy_(value)
        for generator, state in zip(sources, states, strict=True):
            generator.set_state(state)


def _remedy(config: ModelConfig, model: nn.Module, inputs: Any) -> str:
    """What the model does run on, found by trying: other sizes from small to large, then other channels."""
    if not _is_images(inputs):
        return ""
    channels, pixels = inputs.shape[1], inputs.shape[-1]
    first = next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), channels)
    for c in dict.fromkeys((channels, first)):
        for p in (pixels, *SIZES):
            images = inputs.new_zeros(2, c, p, p)
            try:
                try_forward(model, images)
            except Exception:
                continue
            keys = {"img_size": pixels, "image_size": pixels} if c == channels else {"in_chans": channels}
            known = keywords(find_architecture(config.name))
            hints = [f" or set model.args.{key}={value}" for key, value in keys.items() if key in known]
            prepare = f"prepare the task with --pixels {p}" if c == channels else f"give the model {channels} channels"
            return f"; it takes {c} x {p} x {p}: {prepare}{''.join(hints)}"
    return ""


def _is_images(inputs: Any) -> bool:
    return isinstance(inputs, Tensor) and inputs.ndim == 4 and inputs.is_floating_point()


def _describe(inputs: Any) -> str:
    if _is_images(inputs):
        return f"images {' x '.join(map(str, inputs.shape[1:]))} (channels x height x width)"
    return f"{inputs.dtype} {list(inputs.shape)}" if isinstance(inputs, Tensor) else type(inputs).__name__
