"""Augmentation and normalisation on the device; the plan supplies the randomness.

Only tensor operations of fixed shapes: no host synchronisation, and a CUDA graph can capture them. Images are
[B, 3, H, W], boxes integers [B, 4]: top, left, height and width. An image's result does not depend on the batch that
it is in, except for its partner in `mix`.
"""

import torch
from torch import Tensor

from dist_cts.data.plan import PlanChunk

GREY = 0.2989, 0.587, 0.114  # weights of red, green and blue, torchvision's


def augment(
    images: Tensor,
    plan: PlanChunk,
    *,
    padding: int,
    mean: Tensor,
    std: Tensor,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """Crops and flips each image, changes its colors, normalises it and erases a box, as the plan says.

    Args:
        images: uint8 [B, H, W, 3].
        plan: one step, as tensors [B] or [B, n] on the images' device.
        padding: black pixels around the image in which the padded crop is taken.
        mean, std: [3], in 0 .. 1, on the images' device.

    Returns:
        float32 [B, 3, H, W].
    """
    if plan.crop.shape[1]:
        values = resized_crop(images, plan.crop, plan.flip)
    else:
        values = padded_crop(images, plan.top, plan.left, plan.flip, padding)
    if plan.jitter.shape[1]:
        values = jitter(values / 255, plan.jitter) * 255
    values = _to_float(values, mean, std)
    if plan.erase.shape[1]:
        values = values.masked_fill_(_inside(plan.erase, values), 0)
    return values.contiguous(memory_format=memory_format)


def padded_crop(images: Tensor, top: Tensor, left: Tensor, flip: Tensor, padding: int) -> Tensor:
    """Pads each image with black, crops it at (top, left), and flips it horizontally where `flip` is set.

    uint8 [B, H, W, 3] to uint8 [B, 3, H, W]; top and left integers [B], 0 .. 2 * padding; flip bool [B].
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
    return cropped.view(batch, channels, height, width)


def resized_crop(images: Tensor, box: Tensor, flip: Tensor) -> Tensor:
    """Resizes the box of each image to H x W, bilinearly, and flips it horizontally where `flip` is set.

    uint8 [B, H, W, 3] to float32 [B, 3, H, W], 0 .. 255, not rounded. A box is never larger than the image, so
    antialiasing would change nothing.
    """
    values = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    values = _interpolate(values, 2, *_taps(box[:, 0], box[:, 2], values.shape[2]))
    columns = _taps(box[:, 1], box[:, 3], values.shape[3])
    return _interpolate(values, 3, *(torch.where(flip[:, None], x.flip(1), x) for x in columns))


def jitter(images: Tensor, factors: Tensor) -> Tensor:
    """Brightness, contrast and saturation times the factors [B, 3], then, with a fourth one, the hue shifted by it.

    float32 [B, 3, H, W], 0 .. 1; as torchvision's `adjust_brightness` and so on, in this order.
    """
    brightness, contrast, saturation, *hue = factors[:, :, None, None, None].unbind(1)
    images = (brightness * images).clamp(0, 1)
    images = (contrast * images + (1 - contrast) * _grey(images).mean((1, 2, 3), keepdim=True)).clamp(0, 1)
    images = (saturation * images + (1 - saturation) * _grey(images)).clamp(0, 1)
    return _shift_hue(images, hue[0]) if hue else images


def mix(images: Tensor, targets: Tensor, box: Tensor, share: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Mixes image and target 2i with 2i + 1: mixup outside the box, the partner alone inside it (CutMix).

    Neighbors are a random pair, since the order is; every data rank has both of a pair if its batch is even.

    Args:
        images: float32 [B, 3, H, W], B even.
        targets: int64 [B], below `classes`.
        share: float32 [B, 1], weight of the image itself outside its box.

    Returns:
        float32 [B, 3, H, W] and class probabilities, float32 [B, classes].
    """
    height, width = images.shape[2:]
    own = share[:, :, None, None].masked_fill(_inside(box, images), 0)  # [B, 1, H, W]
    own_target = share * (1 - box[:, 2:3].float() * box[:, 3:4] / (height * width))
    targets = torch.nn.functional.one_hot(targets, classes).to(images.dtype)
    images = own * images + (1 - own) * _partners(images)
    return images, own_target * targets + (1 - own_target) * _partners(targets)


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(images / 255 - mean) / std, for test images: uint8 [B, H, W, 3] to float32 [B, 3, H, W]; mean and std [3]."""
    return _to_float(images.permute(0, 3, 1, 2), mean, std)


def _to_float(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    # Channels first during the arithmetic: on a CPU, broadcasting over a last dimension of 3 takes six times as long.
    values = images.to(torch.float32, memory_format=torch.contiguous_format)
    return values.sub_((255 * mean)[:, None, None]).div_((255 * std)[:, None, None])


def _taps(start: Tensor, extent: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each of `size` points, evenly spaced over [start, start + extent): both neighbors and the second's weight.

    start and extent [B]; each result [B, size]. Beyond the box's edge its last pixel is repeated.
    """
    point = torch.arange(size, device=start.device) + 0.5
    position = (point * (extent.float() / size)[:, None] - 0.5).clamp(min=0)
    low = position.floor()
    high = torch.minimum(low + 1, extent[:, None] - 1)
    return (start[:, None] + low).long(), (start[:, None] + high).long(), position - low


def _interpolate(images: Tensor, dim: int, low: Tensor, high: Tensor, weight: Tensor) -> Tensor:
    """Interpolates rows (dim 2) or columns (3) `low` and `high` [B, S] of [B, C, H, W]; weight [B, S] of `high`."""
    shape = [len(images), 1, 1, 1]
    shape[dim] = low.shape[1]
    sizes = [*images.shape]
    sizes[dim] = low.shape[1]
    one, other = (images.gather(dim, index.view(shape).expand(sizes)) for index in (low, high))
    return one + (other - one) * weight.view(shape)


def _inside(box: Tensor, images: Tensor) -> Tensor:
    """Which pixels of [B, 3, H, W] are in their image's box: bool [B, 1, H, W]."""
    top, left, height, width = box[:, :, None].unbind(1)  # [B, 1] each
    y, x = (torch.arange(size, device=box.device) for size in images.shape[2:])
    rows, columns = (y >= top) & (y < top + height), (x >= left) & (x < left + width)
    return (rows[:, :, None] & columns[:, None])[:, None]


def _partners(batch: Tensor) -> Tensor:
    """[B, ...] with 2i and 2i + 1 exchanged."""
    return batch.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def _grey(images: Tensor) -> Tensor:
    """[B, 3, H, W] to [B, 1, H, W]."""
    red, green, blue = images.split(1, 1)
    return GREY[0] * red + GREY[1] * green + GREY[2] * blue


def _shift_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turns the color circle by `shift` [B, 1, 1, 1], in turns, through HSV."""
    red, green, blue = images.split(1, 1)
    value = images.amax(1, keepdim=True)
    chroma = value - images.amin(1, keepdim=True)
    divisor = torch.where(chroma == 0, 1, chroma)
    sector = torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor)
    sector = torch.where(value == red, (green - blue) / divisor, sector)  # 0 .. 6 around the circle, red at 0
    # Channel n of (red, green, blue) = (5, 3, 1) falls from `value` by `chroma` where the hue is far from it.
    n = torch.tensor([5.0, 3.0, 1.0], device=images.device)[:, None, None]
    k = (n + sector + 6 * shift) % 6
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)
