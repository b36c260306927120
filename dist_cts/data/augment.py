"""Random crop, horizontal flip and normalisation on the device; the plan supplies the randomness.

Only tensor operations of fixed shapes: no host synchronisation, and a CUDA graph can capture them.
"""

import torch
from torch import Tensor


def augment(
    images: Tensor,
    top: Tensor,
    left: Tensor,
    flip: Tensor,
    *,
    padding: int,
    mean: Tensor,
    std: Tensor,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """Pads each image with black, crops it at (top, left), flips it where `flip` is set, and normalises it.

    Args:
        images: uint8 [B, H, W, 3].
        top, left: integers [B], 0 .. 2 * padding.
        flip: bool [B], horizontally.
        padding: black pixels added on each side.
        mean, std: [3], in 0 .. 1, on the images' device.

    Returns:
        float32 [B, 3, H, W].
    """
    batch, height, width, channels = images.shape
    inside = (..., slice(padding, padding + height), slice(padding, padding + width))
    padded = images.new_zeros(batch, channels, height + 2 * padding, width + 2 * padding)
    padded[inside] = images.permute(0, 3, 1, 2)
    column = torch.arange(width, device=images.device)
    y = top[:, None] + torch.arange(height, device=images.device)
    x = left[:, None] + torch.where(flip[:, None], width - 1 - column, column)
    pixel = y[:, :, None] * padded.shape[3] + x[:, None, :]  # [B, H, W], shared by all channels
    cropped = padded.flatten(2).gather(2, pixel.flatten(1)[:, None].expand(-1, channels, -1))
    values = _to_float(cropped.view(batch, channels, height, width), mean, std)
    return values.contiguous(memory_format=memory_format)


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(images / 255 - mean) / std, for test images: uint8 [B, H, W, 3] to float32 [B, 3, H, W]; mean and std [3]."""
    return _to_float(images.permute(0, 3, 1, 2), mean, std)


def _to_float(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    # Channels first during the arithmetic: on a CPU, broadcasting over a last dimension of 3 takes six times as long.
    values = images.to(torch.float32, memory_format=torch.contiguous_format)
    return values.sub_((255 * mean)[:, None, None]).div_((255 * std)[:, None, None])
