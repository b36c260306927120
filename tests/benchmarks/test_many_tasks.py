"""The quick form."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import many_tasks


def test_quick_form(tmp_path):
    many_tasks.main(["--quick", "--out", str(tmp_path)])
    results = json.loads(next(tmp_path.glob("*-many-tasks.json")).read_text())["results"]
    assert set(results["seconds_per_round"]) == {"1", "4"}
    for seconds in results["seconds_per_round"].values():
        assert set(seconds) == {"eager", "ours"}
        assert all(value > 0 for values in seconds.values() for value in values)
