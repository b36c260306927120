import pytest
import torch
import torchvision.transforms.functional as reference
from torch._subclasses.fake_tensor import FakeTensorMode

from dist_cts.data.augment import augment, normalise

MEAN, STD = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.5, 0.25, 0.2])


def case(pixels, padding, batch=40):
    generator = torch.Generator().manual_seed(pixels)
    images = torch.randint(256, (batch, pixels, pixels, 3), dtype=torch.uint8, generator=generator)
    top, left = torch.randint(2 * padding + 1, (2, batch), dtype=torch.int16, generator=generator)
    top[:2], left[:2] = torch.tensor([0, 2 * padding]), torch.tensor([2 * padding, 0])
    return images, top, left, torch.rand(batch, generator=generator) < 0.5


@pytest.mark.parametrize(("pixels", "padding"), [(28, 4), (64, 8), (5, 3), (3, 7), (8, 0)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_bits_of_torchvision(pixels, padding, memory_format):
    images, top, left, flip = case(pixels, padding)
    expected = []
    for image, y, x, mirrored in zip(images.permute(0, 3, 1, 2), top, left, flip, strict=True):
        image = reference.crop(reference.pad(image, padding), int(y), int(x), pixels, pixels)
        expected.append(reference.hflip(image) if mirrored else image)
    expected = normalise(torch.stack(expected).permute(0, 2, 3, 1), MEAN, STD)
    result = augment(images, top, left, flip, padding=padding, mean=MEAN, std=STD, memory_format=memory_format)
    assert torch.equal(result, expected)
    assert result.is_contiguous(memory_format=memory_format)


def test_normalise():
    images = case(28, 4)[0]
    expected = reference.normalize(images.permute(0, 3, 1, 2) / 255, MEAN.tolist(), STD.tolist())
    result = normalise(images, MEAN, STD)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
    assert result.is_contiguous()


def test_the_padding_is_black_before_normalising():
    images, top, left, flip = case(8, 8)
    corner = augment(images, top * 0, left * 0, flip, padding=8, mean=MEAN, std=STD)
    assert torch.equal(corner, (-MEAN / STD)[:, None, None].expand_as(corner))


def test_nothing_is_read_back_from_the_device():
    """Fake tensors have no values: whatever needs one on the host raises."""
    with FakeTensorMode():
        images = torch.empty(4, 28, 28, 3, dtype=torch.uint8)
        corner, flip, mean = torch.empty(4, dtype=torch.int16), torch.empty(4, dtype=torch.bool), torch.empty(3)
        result = augment(images, corner, corner, flip, padding=4, mean=mean, std=mean)
    assert result.shape == (4, 3, 28, 28)
