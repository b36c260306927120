"""Readers: from a data set's original layout to train and test images with labels.

A reader takes the folder and returns (train, test), or (everything, None) where the data set defines no split. Classes
are in the order of their sorted names unless the data set numbers them itself; images are in the order of their
classes and then of their sorted paths, or in the order of the list that the data set ships.
"""

import csv
import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dist_cts.data.raw import RawDataset, from_files

Split = tuple[RawDataset, RawDataset | None]
IMAGES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def tiny_imagenet(root: Path) -> Split:
    """TinyImageNet: train/WNID/images, and val, which serves as test, labelled by val/val_annotations.txt."""
    home = _find(root, "wnids.txt", "wnids.txt, train/WNID/images and val/val_annotations.txt")
    wnids = sorted((home / "wnids.txt").read_text().split())
    label_of = {wnid: label for label, wnid in enumerate(wnids)}
    train = [(path, label_of[wnid]) for wnid in wnids for path in _images(home / "train" / wnid / "images")]
    annotations, test = home / "val" / "val_annotations.txt", []
    for number, line in enumerate(_text(annotations).splitlines(), 1):
        columns = line.split("\t")
        if len(columns) < 2 or columns[1] not in label_of:
            raise ValueError(f"{annotations}: line {number} names no class of wnids.txt")
        test.append((home / "val" / "images" / columns[0], label_of[columns[1]]))
    return from_files(wnids, train), from_files(wnids, test)


def gtsrb(root: Path) -> Split:
    """German traffic signs as torchvision unpacks them: GTSRB/Training/CLASS/*.ppm and GT-final_test.csv."""
    home = _find(root, "GTSRB/Training", "GTSRB/Training/CLASS, GTSRB/Final_Test/Images and GT-final_test.csv")
    names, train = _class_folders(home / "GTSRB" / "Training")
    table, test = home / "GT-final_test.csv", []
    for number, row in enumerate(csv.DictReader(_text(table).splitlines(), delimiter=";"), 2):
        label = row.get("ClassId") or ""
        if not label.isdecimal() or int(label) >= len(names):
            raise ValueError(f"{table}: line {number}: {label!r} is none of the classes 0..{len(names) - 1}")
        test.append((home / "GTSRB" / "Final_Test" / "Images" / row["Filename"], int(label)))
    return from_files(names, train), from_files(names, test)


def image_folder(root: Path) -> Split:
    """CLASS/**/IMAGE below train and test (or val) folders; without those, below the root itself."""
    if not (root / "train").is_dir():
        return from_files(*_class_folders(root)), None
    names, train = _class_folders(root / "train")
    held_out = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if held_out is None:
        return from_files(names, train), None
    found, files = _class_folders(held_out)
    if unknown := set(found) - set(names):
        raise ValueError(f"{held_out}: class {min(unknown)} is not in {root / 'train'}")
    return from_files(names, train), from_files(names, [(path, names.index(found[i])) for path, i in files])


def idx(root: Path, class_names: Sequence[str]) -> Split:
    """IDX files as MNIST's, gzipped or not, anywhere below the root; a single pair is returned without a split."""
    pairs = {}
    for path in sorted(root.rglob("*images*idx3*")):
        if path.is_file():
            pairs.setdefault(path.parent / path.name.removesuffix(".gz"), path)
    held_out = [path for path in pairs.values() if "t10k" in path.name or "test" in path.name]
    train = [path for path in pairs.values() if path not in held_out]
    if not pairs:
        raise ValueError(f"{root}: no *images-idx3-ubyte or *images-idx3-ubyte.gz in it or below")
    if len(train) > 1 or len(held_out) > 1:
        raise ValueError(f"{root}: IDX files of several data sets: {', '.join(map(str, pairs.values()))}")
    parts = [_idx_pair(path, class_names) for path in train + held_out]
    return (parts[0], parts[1]) if len(parts) == 2 else (parts[0], None)


def digits(root: Path | None) -> Split:
    """scikit-learn's 1,797 handwritten digits, 8 x 8, which come with the package: there is no folder."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pixels = np.round(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)  # 17 grey levels in the source
    return RawDataset(tuple("0123456789"), labels.astype(np.int64), pixels.__getitem__), None


def embedded(root: Path | None, name: str) -> Split:
    """A task of dist_cts.data.embedded, drawn on the spot."""
    from dist_cts.data.embedded import make

    train, test = make(name)
    return tuple(RawDataset(tuple(part.class_names), part.labels, part.images.__getitem__) for part in (train, test))


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array of an IDX file, gzipped or not.

    Raises:
        ValueError: it is damaged, or no IDX file of bytes; the message names it.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise ValueError(f"{path}: not an IDX file of bytes")
    dimensions = data[3]
    shape = np.frombuffer(data[4 : 4 + 4 * dimensions], ">u4").astype(int)
    body = data[4 + 4 * dimensions :]
    if len(shape) != dimensions or len(body) != shape.prod():
        raise ValueError(f"{path}: {len(body)} bytes of data where its header says {shape.tolist()}")
    return np.frombuffer(body, np.uint8).reshape(shape)


def _idx_pair(images: Path, class_names: Sequence[str]) -> RawDataset:
    name = images.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    labels = next((path for path in (images.with_name(name), images.with_name(name + ".gz")) if path.exists()), None)
    if labels is None:
        raise ValueError(f"{images}: its labels, {name}, are not beside it")
    pixels, classes = read_idx(images), read_idx(labels)
    if pixels.ndim != 3 or classes.ndim != 1 or len(pixels) != len(classes):
        raise ValueError(f"{images}: {list(pixels.shape)} images do not fit {list(classes.shape)} labels in {labels}")
    if classes.max(initial=0) >= len(class_names):
        raise ValueError(f"{labels}: label {classes.max()} where {len(class_names)} classes are expected")
    return RawDataset(tuple(class_names), classes.astype(np.int64), pixels.__getitem__)


def _find(root: Path, landmark: str, layout: str) -> Path:
    """The folder that holds `landmark`: the root or one just below it."""
    for folder in (root, *sorted(root.iterdir())):
        if (folder / landmark).exists():
            return folder
    raise ValueError(f"{root}: no {landmark} in it or one folder below (expected layout: {layout})")


def _class_folders(folder: Path) -> tuple[list[str], list[tuple[Path, int]]]:
    """The sorted names of the class folders, and every image below them with its label."""
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] not in "._")
    if not names:
        raise ValueError(f"{folder}: no class folders in it")
    return names, [(path, label) for label, name in enumerate(names) for path in _images(folder / name)]


def _images(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGES and path.name[0] != ".")
    if not files:
        raise ValueError(f"{folder}: no images in it or below")
    return files


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
