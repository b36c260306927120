"""Datasets for tests, in a module of their own: worker processes import it."""

import os
import random
import time

import numpy as np
import torch
from torch.utils.data import Dataset

from dist_cts.data.datasets import DATASETS


class Noisy(Dataset):
    """Every kind of value, and random transforms from all three generators."""

    classes = 3

    def __init__(self, count=20):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        inputs = {
            "noise": torch.rand(2),
            "pair": (np.random.rand(1), random.random()),
            "index": [index, index],
            "bytes": np.full(2, index, np.uint8)[::-1],
            "threads": torch.get_num_threads(),
            "even": index % 2 == 0,
        }
        return inputs, index % 3


class Faulty(Dataset):
    """Fails at sample 7, as `how` says; the others are 0."""

    def __init__(self, how):
        self.how = how

    def __len__(self):
        return 10

    def __getitem__(self, index):
        if index == 7:
            if self.how == "raise":
                raise OSError("cannot read\nthe image")
            if self.how == "kill":
                os.kill(os.getpid(), 9)
            if self.how == "hang":
                time.sleep(1000)
            return {"word": (("a", 0)), "shape": (torch.zeros(2), 0), "dict": {"x": 0, "y": 0}}[self.how]
        return torch.zeros(3), 0


class Slow(Dataset):
    """Writes the process that loads it into a file, and never returns."""

    def __init__(self, path):
        self.path = path

    def __len__(self):
        return 100

    def __getitem__(self, index):
        with open(self.path, "a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(1000)


class Images(Dataset):
    """Images [3, 8, 8] of noise with a bright channel per class, flipped at random."""

    classes = ("red", "green", "blue")

    def __init__(self, task, split, count=48):
        generator = torch.Generator().manual_seed(2 * task + (split == "test"))
        self.targets = torch.arange(count) % 3
        self.images = torch.rand(count, 3, 8, 8, generator=generator) - 0.5
        self.images[torch.arange(count), self.targets] += 0.5
        self.fingerprint = f"task {task}"

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = self.images[index]
        return image.flip(2) if torch.rand(()) < 0.5 else image, self.targets[index]


def register():
    """The tasks sets-0 .. sets-3."""
    for task in range(4):
        DATASETS[f"sets-{task}"] = lambda split, task=task: Images(task, split)


register()
