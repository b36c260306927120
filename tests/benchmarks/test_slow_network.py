"""The delay's model, its table, and the quick form on real namespaces."""

import json
import os

import pytest

from benchmarks import slow_network
from benchmarks.scaling import delayed_step, far_rows


def test_the_model_of_a_delayed_step():
    assert delayed_step(0.1, 0.25, 0.01, 0) == pytest.approx(0.35)  # nothing is hidden
    assert delayed_step(0.1, 0.25, 0.01, 1) == pytest.approx(0.175)
    assert delayed_step(0.1, 0.25, 0.01, 2) == pytest.approx(0.35 / 3)
    assert delayed_step(0.1, 0.25, 0.01, 3) == 0.1  # d computations are longer than an all-reduce: hidden
    assert delayed_step(0.1, 0.25, 0.2, 9) == 0.2  # the wire is never free
    steps, started = 1000, [0.0] * 1001  # the same by following the loop
    for k in range(1, steps + 1):
        arrived = started[k - 2] + 0.25 if k >= 2 else 0.0  # d = 1: waited for after the start of step k - 1
        started[k] = max(started[k - 1], arrived) + 0.1
    assert started[-1] / steps == pytest.approx(delayed_step(0.1, 0.25, 0.01, 1), rel=1e-2)
    (*_, largest) = far_rows("resnet20", 270_000)
    assert largest["efficiency, d = 0"] < 0.6 < 1 == largest["efficiency, d = 2"]


def test_the_table_compares_the_model_with_what_was_measured():
    link = {"calibration": {"mbit_per_second": 8000}, "mbit": None}
    seconds = {"cts 0": [0.11], "cts 2": [0.11], "sgd": [0.1]}
    near = link | {"delay_ms": 0, "seconds": seconds, "cpu_seconds": seconds, "all_reduce": 0.004}
    seconds = {"cts 0": [0.2], "cts 2": [0.11], "sgd": [0.1]}
    far = link | {"delay_ms": 20, "seconds": seconds, "cpu_seconds": seconds, "all_reduce": 0.094}
    rows = {(row["one way, ms"], row["step"]): row for row in slow_network.table_rows([near, far], 1000, 2, False)}
    assert rows[20, "cts 0"]["model / measured"] == pytest.approx(1)
    assert rows[20, "cts 2"]["model, ms"] == pytest.approx(110)  # the all-reduce's own CPU time is not hidden
    assert rows[20, "sgd"]["model, ms"] == "-"


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")
def test_the_quick_form_on_namespaces(tmp_path, capfd):
    slow_network.main(["--quick", "--out", str(tmp_path)])
    if "skipped" in capfd.readouterr().out:
        pytest.skip("no network namespaces here")
    (path,) = tmp_path.glob("*-slow-network-tiny-2.json")
    results = json.loads(path.read_text())["results"]
    assert [condition["delay_ms"] for condition in results["conditions"]] == [0, 5, 0, 5]
    assert results["conditions"][1]["calibration"]["round_trip_ms"] >= 10
    assert {row["step"] for row in results["stragglers"]} >= {"cts 0", "cts 4", "sgd"}
