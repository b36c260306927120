"""The storage benchmark on little data: that it works, and that what it counts is what is there; no speed."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import report
import storage

from dist_cts.data import beton


def test_quick_form(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("DIST_CTS_DATA", raising=False)
    storage.main(["--quick", "--workers", "1", "--out", str(tmp_path)])
    (path,) = tmp_path.glob("*-storage.json")
    record = json.loads(path.read_text())
    (case,) = record["results"]["cases"]
    raw = case["bytes_an_image"]["raw"]
    assert 0 < raw - 3 * case["pixels"] ** 2 < 100  # the pixels and a record, no share of a page
    assert case["bytes_an_image"]["jpg"] < raw
    assert 20 < case["jpg_psnr_db"] < 50
    assert case["streamed"].keys() == case["written"].keys() == {"raw 1", "jpg 1"}
    assert min(speed["median"] for speed in (*case["streamed"].values(), *case["resident"].values())) > 0
    assert record["command"].startswith("python ")
    assert {"commit", "date", "device", "cores", "packages", "threads"} <= record.keys()
    assert "host" not in record
    assert "| photographs" in capsys.readouterr().out


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
