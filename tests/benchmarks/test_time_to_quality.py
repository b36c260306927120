"""The table rows computed from curves."""

import json

import pytest

from benchmarks import runs, time_to_quality


def test_seconds_are_the_sum_of_the_logged_intervals(tmp_path):
    lines = [(10, {"steps_per_second": 5}), (10, {"test_loss": 1}), (40, {"steps_per_second": 10})]
    lines = [json.dumps({"step": step, "task": task, **more}) for step, more in lines for task in "ab"]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert runs.training_seconds(tmp_path) == pytest.approx({10: 2, 40: 5})


def test_a_level_counts_where_it_is_first_reached():
    def curve(*accuracies):
        return [{"accuracy": a, "seconds": 10.0 * i, "inner_steps": 100 * i} for i, a in enumerate(accuracies, 1)]

    seeds = [{"t": {"cts": curve(20, 40, 30), "reptile": curve(10, 20, 40)}}, {"t": {"cts": [], "reptile": []}}]
    cts, reptile = time_to_quality.table_rows(seeds, [40])
    assert (cts["method"], cts["inner steps"], cts["seeds that reach it"]) == ("cts", "200 (200 - 200)", "1 of 2")
    assert reptile["seconds"] == "30.0 (30.0 - 30.0)"
