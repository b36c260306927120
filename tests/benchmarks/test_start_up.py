"""The quick form."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import start_up


def test_quick_form(tmp_path):
    start_up.main(["--quick", "--out", str(tmp_path)])
    seconds = json.loads(next(tmp_path.glob("*-start-up.json")).read_text())["results"]["seconds"]
    assert set(seconds) == {"import torch", "device", "stream"}
    assert all(value > 0 for (value,) in seconds.values())
