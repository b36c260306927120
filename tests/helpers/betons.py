"""Reads a raw-mode .beton back without FFCV, by the layout that dist_cts.data.beton states."""

from pathlib import Path

import numpy as np

from dist_cts.data import beton


def read_back(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [N,P,P,3] and int64 [N]."""
    manifest, data = beton.read_manifest(path), np.fromfile(path, np.uint8)
    records = np.frombuffer(data, beton.SAMPLE, manifest.count, beton.RECORDS)
    shape = (manifest.pixels, manifest.pixels, 3)
    images = [data[start : start + np.prod(shape)].reshape(shape) for start in records["image"]["pointer"].astype(int)]
    return np.stack(images), records["label"]
