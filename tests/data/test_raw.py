import io

import numpy as np
import pytest
from PIL import Image

from dist_cts.data.prepare import raw


def dataset(labels, classes):
    labels = np.asarray(labels)
    return raw.RawDataset(tuple(f"c{i}" for i in range(classes)), labels, lambda i: np.full((1, 1), i, np.uint8))


def loaded(data):
    """The numbers of the source's images, in order."""
    return [int(data.load(i)[0, 0]) for i in range(len(data))]


@pytest.fixture
def noise():
    return np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)


def reopened(tmp_path, image, suffix="png", **options):
    image.save(tmp_path / f"image.{suffix}", **options)
    return raw.open_image(tmp_path / f"image.{suffix}")


def test_rgb_and_grey_files_keep_their_pixels(tmp_path, noise):
    np.testing.assert_array_equal(reopened(tmp_path, Image.fromarray(noise)), noise)
    grey = reopened(tmp_path, Image.fromarray(noise[..., 0]))
    assert grey.mode == "L"
    np.testing.assert_array_equal(grey, noise[..., 0])


def test_exif_orientation_turns_the_image_upright(tmp_path, noise):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    image = reopened(tmp_path, Image.fromarray(noise), exif=exif)
    np.testing.assert_array_equal(image, np.rot90(noise, -1))


def test_palette_colours_are_looked_up(tmp_path):
    image = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 128, 0, 7, 8, 9])
    expected = np.array([[[255, 0, 0], [0, 128, 0]], [[7, 8, 9], [0, 128, 0]]])
    np.testing.assert_array_equal(reopened(tmp_path, image), expected)


def test_cmyk_becomes_rgb(tmp_path):
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # no cyan: red
    red = np.asarray(reopened(tmp_path, image, "jpg", quality=100))
    assert red.shape == (8, 8, 3)
    np.testing.assert_allclose(red.reshape(-1, 3).mean(0), [255, 0, 0], atol=3)


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bit_grey_keeps_its_upper_byte(tmp_path, suffix):
    values = np.array([[0, 255, 256], [0x1234, 0x80FF, 65535]], np.uint16)
    image = reopened(tmp_path, Image.fromarray(values), suffix)
    np.testing.assert_array_equal(image, [[0, 0, 1], [0x12, 0x80, 255]])


def test_one_bit_images_are_black_and_white(tmp_path):
    image = reopened(tmp_path, Image.fromarray(np.array([[True, False]])))
    np.testing.assert_array_equal(image, [[255, 0]])


def test_transparent_parts_become_white(tmp_path):
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0]]], np.uint8)
    np.testing.assert_array_equal(reopened(tmp_path, Image.fromarray(rgba)), [[[10, 20, 30], [255] * 3]])
    grey = reopened(tmp_path, Image.fromarray(np.array([[[9, 255], [9, 0]]], np.uint8), "LA"))
    np.testing.assert_array_equal(grey, [[9, 255]])
    keyed = reopened(tmp_path, Image.fromarray(np.array([[5, 6]], np.uint8)), transparency=6)
    np.testing.assert_array_equal(keyed, [[5, 255]])


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "tif", "ppm", "webp"])
def test_truncated_images_are_named(tmp_path, suffix):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.save(buffer, {"jpg": "jpeg", "tif": "tiff"}.get(suffix, suffix))
    (tmp_path / f"cut.{suffix}").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    with pytest.raises(ValueError, match=rf"cut\.{suffix}: cannot be decoded"):
        raw.open_image(tmp_path / f"cut.{suffix}")


def test_missing_foreign_and_floating_point_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.png: cannot be decoded"):
        raw.open_image(tmp_path / "gone.png")
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.png: cannot be decoded"):
        raw.open_image(tmp_path / "text.png")
    with pytest.raises(ValueError, match=r"image\.tif: floating-point"):
        reopened(tmp_path, Image.fromarray(np.zeros((2, 2), np.float32)), "tif")


def test_resize_is_pils_bilinear_and_ignores_the_aspect_ratio(noise):
    expected = np.asarray(Image.fromarray(noise).resize((5, 5), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(raw.resize(noise, 5), expected)
    np.testing.assert_array_equal(raw.resize(Image.fromarray(noise), 5), expected)
    square = noise[:4]
    np.testing.assert_array_equal(raw.resize(square, 4), square)


def test_class_ranges_are_half_open_and_count_from_0():
    data = dataset([0, 2, 1, 3, 1, 2], 4)
    low, high = raw.select_classes(data, 0, 2), raw.select_classes(data, 2, 4)
    assert (low.class_names, low.labels.tolist(), loaded(low)) == (("c0", "c1"), [0, 1, 1], [0, 2, 4])
    assert (high.class_names, high.labels.tolist(), loaded(high)) == (("c2", "c3"), [0, 1, 0], [1, 3, 5])


@pytest.mark.parametrize(("first", "stop"), [(0, 5), (2, 2), (3, 1), (-1, 2)])
def test_class_ranges_outside_are_refused(first, stop):
    with pytest.raises(ValueError, match=f"classes {first}:{stop} are not within 0:4"):
        raw.select_classes(dataset([0, 1, 2, 3], 4), first, stop)


def test_split_takes_the_fraction_of_every_class():
    labels = [0] * 50 + [1] * 10 + [2] * 2
    train, test = raw.split(dataset(labels, 3), 0.2, seed=0)
    assert np.bincount(train.labels).tolist() == [40, 8, 1]
    assert np.bincount(test.labels).tolist() == [10, 2, 1]
    assert sorted(loaded(train) + loaded(test)) == list(range(62))
    again = raw.split(dataset(labels, 3), 0.2, seed=0)[1]
    other = raw.split(dataset(labels, 3), 0.2, seed=1)[1]
    assert loaded(again) == loaded(test) != loaded(other)
    assert loaded(test)[:10] != list(range(10))


def test_split_needs_two_images_a_class():
    with pytest.raises(ValueError, match="class c1 has 1 images"):
        raw.split(dataset([0, 0, 1], 2), 0.2, seed=0)


def test_limit_is_balanced_seeded_and_nested():
    data = dataset(np.repeat([0, 1, 2], [30, 3, 30]), 3)
    few, many = raw.limit(data, 9, seed=0), raw.limit(data, 23, seed=0)
    assert np.bincount(few.labels).tolist() == [3, 3, 3]
    assert np.bincount(many.labels).tolist() == [10, 3, 10]
    assert set(loaded(few)) < set(loaded(many))
    assert loaded(many) == sorted(loaded(many))
    assert loaded(raw.limit(data, 9, seed=1)) != loaded(few)
    assert len(raw.limit(data, 1000, seed=0)) == 63
    with pytest.raises(ValueError, match="a limit of 2 images"):
        raw.limit(data, 2, seed=0)
