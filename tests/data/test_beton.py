import json
import resource
import subprocess
import sys

import numpy as np
import pytest

from dist_cts.data import beton
from dist_cts.data.ffcv_library import import_ffcv
from tests.helpers.betons import read_back

NAMES = ["cat", "dog", "emu"]


def make(folder, count=7, pixels=5, channels=3, split="train", **options):
    rng = np.random.default_rng(count)
    shape = (count, pixels, pixels, 3)[: 4 if channels == 3 else 3]
    images, labels = rng.integers(0, 256, shape, dtype=np.uint8), rng.integers(0, 3, count)
    manifest = beton.write(folder / split, images, labels, NAMES, pixels=pixels, source="noise", **options)
    return images, labels, manifest


class Broken:
    """Images of which some cannot be decoded."""

    def __init__(self, images, bad):
        self.images, self.bad = images, bad

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        if index in self.bad:
            raise ValueError(f"photo{index}.jpg\udcff: cannot be decoded")  # a name of any bytes
        return self.images[index]


def ffcv_write(path, images, labels, mode, page):
    """The file that FFCV's own writer makes."""
    ffcv = import_ffcv()
    fields = {"image": ffcv.fields.RGBImageField(write_mode=mode), "label": ffcv.fields.IntField()}
    writer = ffcv.DatasetWriter(str(path), fields, page_size=page, num_workers=1)
    writer.from_indexed_dataset(list(zip(images, labels, strict=True)))


@pytest.mark.parametrize(
    ("mode", "count", "pixels", "page"),
    [
        ("raw", 3, 5, 1 << 21),
        ("raw", 120, 84, 1 << 21),  # 99 images per page
        ("raw", 9, 1024, 1 << 23),
        ("jpg", 9, 1024, 1 << 23),  # pages of noise that end after different numbers of images
    ],
)
def test_the_bytes_are_those_of_ffcvs_writer(tmp_path, mode, count, pixels, page):
    images, labels, manifest = make(tmp_path / "ours", count=count, pixels=pixels, mode=mode)
    ffcv_write(tmp_path / "theirs.beton", images, labels, mode, page)
    ours, theirs = (tmp_path / "ours/train.beton").read_bytes(), (tmp_path / "theirs.beton").read_bytes()
    assert ours == theirs
    assert len(ours) == manifest.bytes


def test_ffcvs_loader_reads_the_same_pixels_and_labels(tmp_path):
    images, labels, manifest = make(tmp_path / "noise", count=150, pixels=84, workers=2)
    ffcv = import_ffcv()
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder

    loader = ffcv.Loader(
        str(tmp_path / "noise/train.beton"),
        batch_size=150,
        num_workers=1,
        order=ffcv.loader.OrderOption.SEQUENTIAL,
        pipelines={"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]},
    )
    ((decoded, read),) = [(image.copy(), label.copy()) for image, label in loader]
    np.testing.assert_array_equal(decoded, images)
    np.testing.assert_array_equal(read[:, 0], labels)
    assert beton.verify(tmp_path / "noise/train.beton") == manifest


def test_an_image_larger_than_a_page_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"an image of 12,000,000 bytes exceeds the page size of 8,388,608 bytes"):
        make(tmp_path / "noise", count=1, pixels=2000)
    assert not list((tmp_path / "noise").iterdir())


def test_jpg_mode_stores_jpeg(tmp_path):
    images = np.full((4, 32, 32, 3), [10, 200, 90], np.uint8)
    beton.write(tmp_path / "flat/train", images, np.arange(4) % 3, NAMES, pixels=32, source="flat", mode="jpg")
    assert beton.verify(tmp_path / "flat/train.beton").mode == "jpg"
    data = (tmp_path / "flat/train.beton").read_bytes()
    assert data.count(b"\xff\xd8\xff") == 4


def test_manifest_says_what_is_there(tmp_path):
    images, _, manifest = make(tmp_path / "noise", count=70)
    assert (manifest.name, manifest.split, manifest.count, manifest.classes) == ("noise", "train", 70, 3)
    assert (manifest.pixels, manifest.channels, manifest.class_names) == (5, 3, NAMES)
    np.testing.assert_allclose(manifest.mean, images.mean((0, 1, 2)) / 255)
    np.testing.assert_allclose(manifest.std, images.std((0, 1, 2)) / 255)
    assert manifest == beton.read_manifest(tmp_path / "noise/train.json")


def test_grey_images_become_three_equal_channels_and_test_takes_over_the_statistics(tmp_path):
    images, _, train = make(tmp_path / "noise", channels=1)
    np.testing.assert_array_equal(read_back(tmp_path / "noise/train.beton")[0], images[..., None].repeat(3, -1))
    _, _, test = make(tmp_path / "noise", count=3, channels=3, split="test", train=train)
    assert train.channels == test.channels == 1
    assert (test.mean, test.std) == (train.mean, train.std)


def test_a_constant_channel_can_be_divided_by_its_std(tmp_path):
    manifest = beton.write(
        tmp_path / "flat/train", np.zeros((2, 4, 4), np.uint8), [0, 1], NAMES, pixels=4, source="flat"
    )
    assert manifest.mean == [0, 0, 0]
    assert min(manifest.std) > 0


def test_the_bytes_do_not_depend_on_the_number_of_workers(tmp_path):
    *_, one = make(tmp_path / "one", count=300, workers=1)
    *_, three = make(tmp_path / "three", count=300, workers=3)
    assert one.sha256 == three.sha256


@pytest.mark.parametrize("workers", [1, 3])
def test_an_image_that_cannot_be_decoded_stops_and_leaves_the_old_file(tmp_path, workers):
    *_, old = make(tmp_path / "noise")
    bad = Broken(np.zeros((400, 5, 5), np.uint8), {250})
    with pytest.raises(ValueError, match=r"photo250\.jpg"):
        beton.write(tmp_path / "noise/train", bad, np.zeros(400), NAMES, pixels=5, source="bad", workers=workers)
    assert beton.verify(tmp_path / "noise/train.beton") == old
    assert sorted(path.name for path in (tmp_path / "noise").iterdir()) == ["train.beton", "train.json"]


def test_skipped_images_are_left_out_and_named(tmp_path):
    rng = np.random.default_rng(0)
    images, labels, bad = rng.integers(0, 256, (200, 5, 5, 3), np.uint8), rng.integers(0, 3, 200), {0, 70, 199}
    manifest = beton.write(
        tmp_path / "noise/train", Broken(images, bad), labels, NAMES, pixels=5, source="x", on_error="skip", workers=2
    )
    kept = [index for index in range(200) if index not in bad]
    read, read_labels = read_back(tmp_path / "noise/train.beton")
    np.testing.assert_array_equal(read, images[kept])
    np.testing.assert_array_equal(read_labels, labels[kept])
    assert manifest.skipped == tuple(f"photo{index}.jpg\\udcff: cannot be decoded" for index in sorted(bad))
    np.testing.assert_allclose(manifest.mean, images[kept].mean((0, 1, 2)) / 255)
    assert beton.verify(tmp_path / "noise/train.beton").count == 197


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
        with pytest.raises(OSError, match="File too large"):
            make(tmp_path / "noise")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "noise").iterdir())


def test_what_a_killed_run_left_is_removed(tmp_path):
    (tmp_path / "noise").mkdir()
    (tmp_path / "noise/train.123.tmp").write_text("half a file")
    make(tmp_path / "noise")
    assert sorted(path.name for path in (tmp_path / "noise").iterdir()) == ["train.beton", "train.json"]


def test_nothing_that_decodes_is_an_error(tmp_path):
    bad = Broken(np.zeros((3, 5, 5), np.uint8), {0, 1, 2})
    with pytest.raises(ValueError, match=r"none of the images can be decoded.*photo0\.jpg"):
        beton.write(tmp_path / "noise/train", bad, np.zeros(3), NAMES, pixels=5, source="x", on_error="skip")
    assert not list((tmp_path / "noise").iterdir())


@pytest.mark.parametrize(
    ("images", "labels", "fault"),
    [
        (np.zeros((0, 5, 5), np.uint8), [], "0 images"),
        (np.zeros((2, 5, 5), np.uint8), [0], "2 images and 1 labels"),
        (np.zeros((2, 5, 5), np.uint8), [0, 3], r"labels 0\.\.3; expected 0\.\.2"),
        (np.zeros((2, 5, 5), np.uint8), [-1, 0], r"labels -1\.\.0"),
        (np.zeros((2, 6, 6), np.uint8), [0, 1], "image 0 is uint8"),
        (np.zeros((2, 5, 5)), [0, 1], "image 0 is float64"),
    ],
)
def test_wrong_input_is_refused(tmp_path, images, labels, fault):
    with pytest.raises(ValueError, match=fault):
        beton.write(tmp_path / "noise/train", images, labels, NAMES, pixels=5, source="x")


def edit_manifest(**changes):
    def edit(folder):
        values = json.loads((folder / "train.json").read_text())
        del values["seal"]  # by hand, it may be changed
        (folder / "train.json").write_text(json.dumps(values | changes))

    return edit


def edit_beton(offset, value):
    def edit(folder):
        with open(folder / "train.beton", "rb+") as file:
            file.seek(offset)
            file.write(value)

    return edit


def truncate(name, size):
    def edit(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: size if size >= 0 else len(data) + size])

    return edit


def torn(folder):
    """As FFCV leaves it when killed before the end: the size may be right, the header is not final."""
    edit_beton(beton.HEADER.fields["table"][1], bytes(8))(folder)


def replace(folder, old, new):
    text = (folder / "train.json").read_text()
    assert old in text
    (folder / "train.json").write_text(text.replace(old, new))


def last(folder):
    """A pointer to the last byte of the file."""
    return ((folder / "train.beton").stat().st_size - 1).to_bytes(8, "little")


FAULTS = {
    "truncated": (truncate("train.beton", -1), r"bytes, expected \d+ from its manifest"),
    "truncated to nothing": (truncate("train.beton", 0), r"0 bytes, expected \d+ from its manifest"),
    "torn": (torn, "allocation table"),
    "table outside": (edit_beton(16, b"\xff" * 7), "allocation table"),
    "other version": (edit_beton(0, b"\x09"), "not an FFCV file"),
    "other fields": (edit_beton(beton.HEADER.itemsize + 1, b"voice"), "not an FFCV file"),
    "other count in the header": (edit_beton(8, b"\x08"), "8 samples, expected 7"),
    "label": (edit_beton(beton.RECORDS + 16, b"\x03"), r"labels 0\.\.3, expected 0\.\.2"),
    "image outside": (edit_beton(beton.RECORDS + 5, b"\xff" * 8), "outside the file"),
    "one bit of an image": (edit_beton((1 << 21) + 30, b"\x00\x01\x02"), "checksum"),
    "count in the manifest": (edit_manifest(count=6), "7 samples, expected 6"),
    "classes in the manifest": (edit_manifest(classes=2, class_names=["a", "b"]), r"labels 0\.\.2, expected 0\.\.1"),
    "pixels in the manifest": (edit_manifest(pixels=6), "not 6 x 6"),
    "checksum in the manifest": (edit_manifest(sha256="0" * 64), "checksum"),
    "manifest altered": (lambda folder: replace(folder, '"noise"', '"voice"'), "modified since it was written"),
    "other mode in the manifest": (edit_manifest(mode="jpg"), "not stored as jpg"),
    "image half outside": (lambda folder: edit_beton(beton.RECORDS + 5, last(folder))(folder), "outside the file"),
    "std of nothing": (edit_manifest(std=[0.0, 1.0, 1.0]), "std: 0: expected a number above 0"),
    "manifest torn": (truncate("train.json", 100), "not a valid manifest"),
    "manifest empty": (truncate("train.json", 0), "not a valid manifest"),
    "manifest without a key": (lambda folder: (folder / "train.json").write_text("{}"), "name: missing"),
    "manifest with an unknown key": (edit_manifest(colour=1), "colour"),
    "manifest of another format": (edit_manifest(format=2), "format"),
    "manifest with too few names": (edit_manifest(class_names=["a"]), "3 classes but 1 class names"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_whatever_does_not_fit_is_an_error_that_names_the_file(tmp_path, fault):
    make(tmp_path)
    beton.verify(tmp_path / "train.beton")
    edit, message = FAULTS[fault]
    edit(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        beton.verify(tmp_path / "train.beton")
    line = str(caught.value)
    assert str(tmp_path / "train") in line
    assert line.endswith("prepare the task again with `dist-cts prepare`")
    assert "\n" not in line


@pytest.mark.parametrize("missing", ["train.beton", "train.json"])
def test_a_missing_file_is_named(tmp_path, missing):
    make(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(FileNotFoundError, match=missing):
        beton.verify(tmp_path / "train.beton")


def test_without_checksum_only_the_records_are_read(tmp_path):
    make(tmp_path)
    FAULTS["one bit of an image"][0](tmp_path)
    beton.verify(tmp_path / "train.beton", checksum=False)
    FAULTS["label"][0](tmp_path)
    with pytest.raises(ValueError, match=r"labels 0\.\.3"):
        beton.verify(tmp_path / "train.beton", checksum=False)


def test_ffcv_is_imported_late_and_leaves_torch_its_threads():
    code = """
import sys, torch
torch.set_num_threads(3)
import dist_cts.data.prepare.task
assert "ffcv" not in sys.modules
from dist_cts.data.ffcv_library import import_ffcv
assert hasattr(import_ffcv(), "Loader")
assert torch.get_num_threads() == 3, torch.get_num_threads()
import ffcv.fields.rgb_image, numba.typed
assert type(ffcv.fields.rgb_image.IMAGE_MODES) is dict, "numba compiles its own dictionary for seconds"
assert numba.typed.Dict is not dict
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=250)


def test_several_threads_may_import_ffcv_at_once():
    code = """
import concurrent.futures, numba.typed, torch  # the threads differ in ffcv alone
from dist_cts.data.ffcv_library import import_ffcv
before = numba.typed.Dict
with concurrent.futures.ThreadPoolExecutor(4) as pool:
    list(pool.map(lambda _: import_ffcv(), range(4)))
assert numba.typed.Dict is before
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=250)


@pytest.mark.parametrize("mode", ["raw", "jpg"])
def test_only_jpeg_needs_ffcv(tmp_path, monkeypatch, mode):
    monkeypatch.setitem(sys.modules, "ffcv", None)
    if mode == "raw":
        make(tmp_path, mode=mode)
    else:
        with pytest.raises(ImportError, match=r"apt-get install .*conda install .*pip install ffcv==1\.0\.2"):
            make(tmp_path, mode=mode)
        assert not list(tmp_path.iterdir())
