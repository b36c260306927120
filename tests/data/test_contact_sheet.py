import numpy as np
import pytest
from PIL import Image

from dist_cts.data import beton
from dist_cts.data.prepare import contact_sheet


@pytest.fixture
def written(tmp_path):
    images = np.full((9, 16, 16, 3), np.arange(0, 252, 28).reshape(9, 1, 1, 1), np.uint8)  # flat: kind to JPEG
    labels = np.arange(9) % 3
    for mode in ("raw", "jpg"):
        path = tmp_path / mode / "train"
        beton.write(path, images, labels, ["a $x", "b", "c"], pixels=16, source="s", mode=mode)
    return tmp_path, images, labels


@pytest.mark.parametrize("mode", ["raw", "jpg"])
def test_images_and_labels_are_those_of_the_file(written, mode):
    folder, images, labels = written
    indices = np.array([7, 0, 3])
    found, numbers = contact_sheet.read(folder / mode / "train.beton", indices)
    assert numbers.tolist() == labels[indices].tolist()
    error = np.abs(found.astype(int) - images[indices])
    assert error.max() == 0 if mode == "raw" else error.max() < 4


def test_the_sheet_is_a_picture_of_them(written):
    folder, *_ = written
    contact_sheet.draw(folder / "raw/train.beton", folder / "sheet.png", count=5)
    sheet = np.asarray(Image.open(folder / "sheet.png").convert("RGB"))
    assert min(sheet.shape[:2]) > 100
    assert (sheet != 255).mean() > 0.2
    contact_sheet.draw(folder / "raw/train.beton", folder / "again.png", count=5)
    assert (folder / "again.png").read_bytes() == (folder / "sheet.png").read_bytes()
