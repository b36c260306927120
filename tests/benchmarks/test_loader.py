"""All loaders give what a model takes."""

import torch

from benchmarks import loader
from tests.helpers.batches import write_task


def test_augmented_batches_are_alike(tmp_path):
    task = tmp_path / "noise"
    write_task(task.parent, task.name, count=64, pixels=12)
    loader.write_png(task)
    for name, workers in (("resident", 1), ("torchvision", 0)):
        images = next(loader.open_loader(task, name, "augmented", 32, workers, torch.device("cpu")))
        assert images.shape == (32, 3, 12, 12)
        assert images.dtype == torch.float32
        assert images.min() == -1  # the border
        assert 0.9 < images.max() <= 1
