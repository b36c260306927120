"""The quick form."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import placement


def test_quick_form(tmp_path):
    placement.main(["--quick", "--out", str(tmp_path)])
    results = json.loads(next(tmp_path.glob("*-placement.json")).read_text())["results"]
    assert len(results["costs"]) == 8
    assert results["costs"]["aircraft"] == results["costs"]["stanford-dogs"]  # both of 84 px
    assert results["costs"]["fashion-mnist"] < results["costs"]["cub"]
    assert set(results["seconds_per_step"]) == {"even", "auto"}
    assert all(value > 0 for values in results["seconds_per_step"].values() for value in values)
