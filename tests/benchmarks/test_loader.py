"""All loaders return batches in the format that a model expects."""

import numpy as np
import torch

from benchmarks import loader
from dist_cts.data import beton


def test_augmented_batches_are_alike(tmp_path):
    task = tmp_path / "noise"
    images = np.random.default_rng(0).integers(0, 256, (64, 12, 12, 3), dtype=np.uint8)
    beton.write(task / "train", images, np.arange(64) % 2, ["0", "1"], pixels=12, source="noise")
    loader.write_png(task)
    for name, workers in (("resident", 1), ("torchvision", 0)):
        images = next(loader.open_loader(task, name, "augmented", 32, workers, torch.device("cpu")))
        assert images.shape == (32, 3, 12, 12)
        assert images.dtype == torch.float32
        assert images.min() == -1  # the border
        assert 0.9 < images.max() <= 1
