"""What the storage benchmark counts, and how every benchmark takes turns and prints tables."""

import numpy as np
import pytest
import torch

from benchmarks import report, storage
from dist_cts.data import beton


def test_bytes_an_image_do_not_depend_on_how_many_there_are(tmp_path):
    def bytes_each(count):
        images, labels = np.zeros((count, 20, 20, 3), np.uint8), np.zeros(count, int)
        manifest = beton.write(tmp_path / f"{count}/train", images, labels, ["a"], pixels=20, source="black")
        return storage.bytes_an_image(tmp_path / f"{count}/train.beton", manifest)

    assert bytes_each(3) == bytes_each(50) == 20 * 20 * 3 + 24 + beton.SAMPLE.itemsize


def test_psnr():
    images = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    assert storage.psnr(images, images + 255) == pytest.approx(0)
    assert storage.psnr(images, images + 1) == pytest.approx(48.13, abs=0.01)


def test_competitors_take_turns_and_change_places():
    calls = []
    competitors = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = report.alternate(competitors, rounds=3, warm_up=1)
    assert [len(each) for each in seconds.values()] == [3, 3]
    assert "".join(calls) in ("abbaabba", "baabbaab")


def test_a_ratio_is_that_of_each_round():
    ratio = report.ratio([1, 20, 300], [2, 10, 100])
    assert ratio == {"median": 2, "low": 0.5, "high": 3, "rounds": 3}
    assert report.shown(ratio) == "2.00 (0.500 - 3.00)"


def test_table_has_a_column_for_every_key_and_three_figures():
    rows = [{"what": "one", "s": 0.00012345}, {"what": "two", "s": 123456.0}]
    assert report.table(rows).splitlines() == [
        "| what | s        |",
        "|------|----------|",
        "| one  | 0.000123 |",
        "| two  | 123,456  |",
    ]
