"""The quick form, and that all loaders give what a model takes."""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import learners
import loader


def test_quick_form(tmp_path):
    loader.main(["--quick", "--out", str(tmp_path)])
    results = json.loads(next(tmp_path.glob("*-loader.json")).read_text())["results"]
    assert set(results["decoded"]) == set(loader.LOADERS)
    for result in results["decoded"].values():
        assert result["batches"] > 0
        assert all(seconds > 0 for seconds in result["seconds"] + result["cpu_seconds"])


def test_augmented_batches_are_alike(tmp_path):
    task = learners.noise_task(tmp_path / "noise", pixels=12, count=64)
    loader.write_png(task)
    for name, workers in (("resident", 1), ("torchvision", 0)):
        images = next(loader.open_loader(task, name, "augmented", 32, workers, torch.device("cpu")))
        assert images.shape == (32, 3, 12, 12)
        assert images.dtype == torch.float32
        assert images.min() == -1  # the border
        assert 0.9 < images.max() <= 1
