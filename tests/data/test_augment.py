import numpy as np
import pytest
import torch
import torchvision.transforms.functional as reference
from torch._subclasses.fake_tensor import FakeTensorMode

from dist_cts.data.augment import augment, jitter, mix, normalise, resized_crop
from dist_cts.data.plan import PlanChunk

MEAN, STD = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.5, 0.25, 0.2])


def case(pixels, padding, batch=40):
    generator = torch.Generator().manual_seed(pixels)
    images = torch.randint(256, (batch, pixels, pixels, 3), dtype=torch.uint8, generator=generator)
    top, left = torch.randint(2 * padding + 1, (2, batch), dtype=torch.int16, generator=generator)
    top[:2], left[:2] = torch.tensor([0, 2 * padding]), torch.tensor([2 * padding, 0])
    return images, top, left, torch.rand(batch, generator=generator) < 0.5


def chunk(top, left, flip, **extra):
    """One step of a plan with nothing but a padded crop and a flip, and `extra`."""
    off = dict.fromkeys(
        ("crop", "jitter", "erase", "cut", "share", "label"), torch.zeros(len(flip), 0, dtype=torch.int16)
    )
    return PlanChunk(None, top, left, flip, **off | extra)


def boxes(pixels, batch=40):
    """int16 [batch, 4]; the first is the whole image, the second one pixel in its corner, the third empty."""
    size = torch.randint(1, pixels + 1, (2, batch), generator=torch.Generator().manual_seed(pixels))
    corner = (torch.rand(2, batch, generator=torch.Generator().manual_seed(1)) * (pixels + 1 - size)).long()
    box = torch.cat((corner, size)).T
    box[:3] = torch.tensor([[0, 0, pixels, pixels], [pixels - 1, pixels - 1, 1, 1], [1, 1, 0, 0]])
    return box.to(torch.int16)


@pytest.mark.parametrize(("pixels", "padding"), [(28, 4), (64, 8), (5, 3), (3, 7), (8, 0)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_bits_of_torchvision(pixels, padding, memory_format):
    images, top, left, flip = case(pixels, padding)
    expected = []
    for image, y, x, mirrored in zip(images.permute(0, 3, 1, 2), top, left, flip, strict=True):
        image = reference.crop(reference.pad(image, padding), int(y), int(x), pixels, pixels)
        expected.append(reference.hflip(image) if mirrored else image)
    expected = normalise(torch.stack(expected).permute(0, 2, 3, 1), MEAN, STD)
    plan = chunk(top, left, flip)
    result = augment(images, plan, padding=padding, mean=MEAN, std=STD, memory_format=memory_format)
    assert torch.equal(result, expected)
    assert result.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("pixels", [28, 64, 5])
def test_a_resized_crop_is_torchvisions(pixels):
    images, _, _, flip = case(pixels, 4)
    box = boxes(pixels)
    box[2] = torch.tensor([0, 1, 2, 2])
    result = resized_crop(images, box, flip)
    for image, (top, left, height, width), mirrored, found in zip(images, box.tolist(), flip, result, strict=True):
        image = image.permute(2, 0, 1).float()
        expected = reference.resized_crop(image, top, left, height, width, [pixels, pixels], antialias=True)
        expected = reference.hflip(expected) if mirrored else expected
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)  # of 255
    whole = images[0].permute(2, 0, 1).float()
    assert torch.equal(result[0], reference.hflip(whole) if flip[0] else whole)


@pytest.mark.parametrize("hue", [True, False])
def test_color_jitter_is_torchvisions(hue):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(40, 3, 9, 9, generator=generator)
    images[0], images[1, 1:], images[2, :, 0] = 0.25, 0, 1  # grey, red, white: no hue, and the edges of its sectors
    factors = torch.cat((2 * torch.rand(40, 3, generator=generator), torch.rand(40, 1, generator=generator) - 0.5), 1)
    result = jitter(images, factors if hue else factors[:, :3])
    for image, (brightness, contrast, saturation, shift), found in zip(images, factors.tolist(), result, strict=True):
        expected = reference.adjust_contrast(reference.adjust_brightness(image, brightness), contrast)
        expected = reference.adjust_saturation(expected, saturation)
        expected = reference.adjust_hue(expected, shift) if hue else expected
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_all_of_them_in_torchvisions_order():
    images, top, left, flip = case(28, 4)
    crop, erase = boxes(28).flip(0), boxes(28)
    crop[-3] = crop[0]  # not empty
    factors = torch.rand(40, 4, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.5
    plan = chunk(top, left, flip, crop=crop, jitter=factors, erase=erase)
    result = augment(images, plan, padding=4, mean=MEAN, std=STD)
    expected = jitter(resized_crop(images, crop, flip) / 255, factors)
    expected = reference.normalize(expected, MEAN.tolist(), STD.tolist())
    for image, (top, left, height, width) in zip(expected, erase.tolist(), strict=True):
        reference.erase(image, top, left, height, width, torch.zeros(()), inplace=True)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    assert (result[0] == 0).all()


def test_mixup_and_cutmix_image_by_image():
    generator = torch.Generator().manual_seed(0)
    images, targets = torch.rand(12, 3, 8, 8, generator=generator), torch.randint(5, (12,), generator=generator)
    box, share = boxes(8, 12), torch.rand(12, 1, generator=generator)
    box[:6], share[6:] = 0, 1  # mixup, then CutMix
    mixed, probabilities = mix(images, targets, box, share, classes=5)
    for slot, (top, left, height, width) in enumerate(box.tolist()):
        partner, weight = slot + 1 if slot % 2 == 0 else slot - 1, float(share[slot])
        image, target = weight * images[slot] + (1 - weight) * images[partner], np.zeros(5)
        if slot >= 6:
            patch = (..., slice(top, top + height), slice(left, left + width))
            image[patch] = images[partner][patch]
            weight = 1 - height * width / 64
        target[targets[slot]] += weight
        target[targets[partner]] += 1 - weight
        torch.testing.assert_close(mixed[slot], image, rtol=0, atol=1e-6)
        np.testing.assert_allclose(probabilities[slot], target, atol=1e-6)


def test_normalise():
    images = case(28, 4)[0]
    expected = reference.normalize(images.permute(0, 3, 1, 2) / 255, MEAN.tolist(), STD.tolist())
    result = normalise(images, MEAN, STD)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
    assert result.is_contiguous()


def test_the_padding_is_black_before_normalising():
    images, top, left, flip = case(8, 8)
    corner = augment(images, chunk(top * 0, left * 0, flip), padding=8, mean=MEAN, std=STD)
    assert torch.equal(corner, (-MEAN / STD)[:, None, None].expand_as(corner))


@pytest.mark.parametrize("resized", [True, False])
def test_nothing_is_read_back_from_the_device(resized):
    """Fake tensors have no values: whatever needs one on the host raises."""
    with FakeTensorMode():
        images = torch.empty(4, 28, 28, 3, dtype=torch.uint8)
        corner, flip, mean = torch.empty(4, dtype=torch.int16), torch.empty(4, dtype=torch.bool), torch.empty(3)
        box, four, one = torch.empty(4, 4, dtype=torch.int16), torch.empty(4, 4), torch.empty(4, 1)
        extra = {"crop": box} if resized else {}
        plan = chunk(corner, corner, flip, jitter=four, erase=box, **extra)
        images = augment(images, plan, padding=4, mean=mean, std=mean)
        images, targets = mix(images, torch.empty(4, dtype=torch.int64), box, one, classes=7)
    assert (images.shape, targets.shape) == ((4, 3, 28, 28), (4, 7))
