"""RawDataset: labels in memory and images opened on demand; image decoding, resizing and sample selection."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps

from dist_cts.seeds import hashed_seed


@dataclass(frozen=True)
class RawDataset:
    """labels int64 [N]; `load(i)` returns image i in its original size, uint8 [H, W] or [H, W, 3] or PIL L or RGB."""

    class_names: tuple[str, ...]
    labels: np.ndarray
    load: Callable[[int], Image.Image | np.ndarray]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray) -> "RawDataset":
        return replace(self, labels=self.labels[indices], load=lambda i: self.load(int(indices[i])))


RawSplits = tuple[RawDataset, RawDataset | None]  # train and test; (everything, None) if no split is defined


@dataclass(frozen=True)
class Resized(Sequence):
    """The images of a dataset, each resized to uint8 [pixels, pixels] or [pixels, pixels, 3]."""

    raw: RawDataset
    pixels: int

    def __len__(self) -> int:
        return len(self.raw)

    def __getitem__(self, index: int) -> np.ndarray:
        return resize(self.raw.load(index), self.pixels)


def from_files(class_names: Sequence[str], files: Sequence[tuple[Path, int]]) -> RawDataset:
    """A dataset of (path, label) pairs, in this order."""
    return from_named(class_names, files, open_image)


def from_named(class_names: Sequence[str], named: Sequence[tuple[Any, int]], load: Callable) -> RawDataset:
    """A dataset of (name, label) pairs, in this order; `load(name)` returns the image."""
    labels = np.array([label for _, label in named], dtype=np.int64)
    return RawDataset(tuple(class_names), labels, lambda i: load(named[i][0]))


def inside(folder: Path, name: str | Path) -> Path:
    """FOLDER/NAME for a name (relative or absolute) read from a file; symbolic links are followed.

    Raises:
        ValueError: the path is outside the folder.
    """
    path = folder / name
    if not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder)):
        raise ValueError(f"{str(name)!r} is outside {folder}")
    return path


def open_image(path: Path) -> Image.Image:
    """Decodes an image file; see `decode`."""
    if not path.is_file():  # reading a pipe would never end
        raise ValueError(f"{path}: cannot be decoded: file not found")
    return decode(path, path)


def decode(source: Path | BinaryIO, path: Path | str) -> Image.Image:
    """The first frame of an image file, upright (EXIF), as L if greyscale and RGB otherwise; errors call it `path`.

    16-bit greyscale keeps its upper byte, as PIL does for 16-bit colour; transparent pixels become white.

    Raises:
        ValueError: it cannot be decoded, or has floating-point pixels; the message names the file.
    """
    try:
        with Image.open(source) as file:
            image = ImageOps.exif_transpose(file)
            image.load()
    except Exception as error:  # decoders of damaged files raise almost anything
        raise ValueError(f"{path}: cannot be decoded: {' '.join(str(error).split())}") from None
    if image.mode in ("L", "RGB") and not image.has_transparency_data:
        return image
    if image.mode == "F":
        raise ValueError(f"{path}: floating-point pixels are not supported, their range is undefined")
    if image.mode.startswith("I"):  # "I;16" and its byte orders; PIL reads a 16-bit PGM as "I"
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError(f"{path}: pixel values {values.min()}..{values.max()}, expected 0..65535")
        return Image.fromarray((values >> 8).astype(np.uint8))
    grey = image.mode in ("1", "L", "LA", "La")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("L" if grey else "RGB")


def resize(image: Image.Image | np.ndarray, pixels: int) -> np.ndarray:
    """uint8 [pixels, pixels] or [pixels, pixels, 3] by PIL's bilinear filter; the aspect ratio is not preserved."""
    if image.size != (pixels, pixels) if isinstance(image, Image.Image) else image.shape[:2] != (pixels, pixels):
        image = image if isinstance(image, Image.Image) else Image.fromarray(image)
        image = image.resize((pixels, pixels), Image.Resampling.BILINEAR)
    return np.asarray(image)


def select_classes(raw: RawDataset, first: int, stop: int) -> RawDataset:
    """The classes first..stop-1, counted from 0 in the dataset's order; `first` becomes label 0."""
    if not 0 <= first < stop <= len(raw.class_names):
        raise ValueError(f"classes {first}:{stop} are not within 0:{len(raw.class_names)}")
    chosen = raw.take(np.flatnonzero((first <= raw.labels) & (raw.labels < stop)))
    return replace(chosen, class_names=raw.class_names[first:stop], labels=chosen.labels - first)


def split(raw: RawDataset, test_fraction: float, seed: int) -> tuple[RawDataset, RawDataset]:
    """Train and test part: a random `test_fraction` of every class, at least one image, is the test part."""
    position = _order_in_class(raw, "split", seed)
    sizes = np.bincount(raw.labels, minlength=len(raw.class_names))
    if sizes.min() < 2:
        name = raw.class_names[int(sizes.argmin())]
        raise ValueError(f"class {name} has {sizes.min()} images; a train and test split needs at least 2")
    share = np.clip(np.round(sizes * test_fraction), 1, sizes - 1)
    test = position < share[raw.labels]
    return raw.take(np.flatnonzero(~test)), raw.take(np.flatnonzero(test))


def limit(raw: RawDataset, count: int, seed: int) -> RawDataset:
    """A class-balanced random subset of `count` images, as far as every class has enough; all if there are fewer.

    With the same seed, a smaller subset is contained in a larger one.
    """
    if count < len(raw.class_names):
        raise ValueError(f"a limit of {count} images; expected at least {len(raw.class_names)}, one per class")
    by_turns = np.lexsort(
        (raw.labels, _order_in_class(raw, "limit", seed))
    )  # the first of every class, then the second
    return raw.take(np.sort(by_turns[:count]))


def _order_in_class(raw: RawDataset, purpose: str, seed: int) -> np.ndarray:
    """int64 [N]: the position of each image in a random order of its class."""
    position = np.empty(len(raw), np.int64)
    for label, name in enumerate(raw.class_names):
        members = np.flatnonzero(raw.labels == label)
        position[members] = np.random.default_rng(hashed_seed(purpose, seed, name)).permutation(len(members))
    return position
