"""The quick form."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "many_tasks.py"


def test_quick_form(tmp_path):
    subprocess.run([sys.executable, SCRIPT, "--quick", "--out", tmp_path], check=True, timeout=100)
    results = json.loads(next(tmp_path.glob("*-many-tasks.json")).read_text())["results"]
    assert set(results["seconds_per_round"]) == {"1", "4"}
    for seconds in results["seconds_per_round"].values():
        assert set(seconds) == {"eager", "ours"}
        assert all(value > 0 for values in seconds.values() for value in values)
