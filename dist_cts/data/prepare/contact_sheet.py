"""Contact sheet: a PNG of random images of a .beton file with their labels."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from dist_cts.data import beton
from dist_cts.data.manifest import read_manifest


def read(path: Path, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [n, P, P, 3] of a .beton file, decoded without FFCV, and their labels int64 [n]."""
    manifest = read_manifest(path)
    side = manifest.pixels
    samples = np.memmap(path, beton.SAMPLE, "r", beton.RECORDS, manifest.count)[indices]
    images, raw = np.empty((len(indices), side, side, 3), np.uint8), manifest.mode == "raw"
    with open(path, "rb") as file:
        for image, pointer in zip(images, samples["image"]["pointer"], strict=True):
            file.seek(int(pointer))
            data = file.read(image.nbytes + (0 if raw else 4096))  # a JPEG decoder finds the end itself
            image[:] = np.frombuffer(data, np.uint8).reshape(image.shape) if raw else Image.open(io.BytesIO(data))
    return images, samples["label"].astype(np.int64)


def draw(path: Path, out: Path, count: int = 40, seed: int = 0) -> None:
    """Writes a PNG of `count` random images with their class names.

    Raises:
        FileNotFoundError: the .beton file or its manifest does not exist.
        ValueError: they do not match.
    """
    from matplotlib.figure import Figure

    manifest = beton.verify(path, checksum=False)
    rng = np.random.default_rng(seed)
    indices = np.sort(rng.choice(manifest.count, min(count, manifest.count), replace=False))
    images, labels = read(path, indices)
    columns = min(8, len(images))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(1.5 * columns, 1.75 * rows + 0.4), layout="constrained")
    figure.suptitle(
        f"{manifest.name} {manifest.split}: {manifest.count:,} images, {manifest.classes} classes, "
        f"{manifest.pixels} px, {manifest.mode}",
        fontsize=9,
    )
    for axes in (grid := figure.subplots(rows, columns, squeeze=False)).flat:
        axes.axis("off")
    for axes, image, label in zip(grid.flat, images, labels, strict=False):
        axes.imshow(image, interpolation="nearest")
        axes.set_title(f"{label} {manifest.class_names[label]}"[:22], fontsize=6, parse_math=False)
    figure.savefig(out, dpi=110)
