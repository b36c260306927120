"""Small tasks: batches in memory, and prepared tasks of coloured noise."""

import numpy as np
import torch

from dist_cts.data import beton


class MemoryBatches:
    """A task's batches from a generator keyed by (task, step); a data rank gets its slice."""

    def __init__(self, task, *, batch_size=8, classes=4, pixels=8, data_rank=0, data_ranks=1):
        self.task, self.batch_size, self.classes, self.pixels = task, batch_size, classes, pixels
        self.share = slice(data_rank * batch_size // data_ranks, (data_rank + 1) * batch_size // data_ranks)
        self.step, self.wait_seconds = 0, 0.0

    def batch_at(self, step):
        generator = torch.Generator().manual_seed(1000 * self.task + step)
        x = torch.randn(self.batch_size, 3, self.pixels, self.pixels, generator=generator)
        y = torch.randint(self.classes, (self.batch_size,), generator=generator)
        return x[self.share], y[self.share]

    def next(self):
        self.step += 1
        return self.batch_at(self.step - 1)

    def seek(self, step):
        self.step = step


def write_task(folder, name, *, count=60, classes=3, pixels=8, seed=0):
    """A prepared task of coloured noise: a class is a colour, so that it can be learned."""
    generator = np.random.default_rng(seed)
    train = None
    for split in ("train", "test"):
        labels = np.arange(count) % classes
        images = generator.integers(0, 128, (count, pixels, pixels, 3), dtype=np.uint8)
        images[np.arange(count), :, :, labels % 3] += 100
        names = [str(label) for label in range(classes)]
        train = beton.write(folder / name / split, images, labels, names, pixels=pixels, source="noise", train=train)
