"""Batches in memory, for tests that need no file."""

import torch


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
