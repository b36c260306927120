"""The delay's model, its table, and the quick form on real namespaces."""

import json
import os

import pytest

from benchmarks import slow_network
from benchmarks.delay_model import Send, delayed_step, ring
from benchmarks.scaling import far_rows


def test_the_model_of_a_delayed_step():
    for delay, expected in enumerate((0.35, 0.175, 0.35 / 3, 0.1)):  # hidden once d computations last an all-reduce
        assert delayed_step(0.1, [Send(0.01, 0.24)], delay) == pytest.approx(expected, rel=0.02)
    assert delayed_step(0.1, [Send(0.2, 0)], 9) == pytest.approx(0.2, rel=0.01)  # the wire is never free
    (*_, largest) = far_rows("resnet20", 270_000)
    assert largest["efficiency, d = 0"] < 0.6 < 0.99 < largest["efficiency, d = 2"]


def test_messages_in_flight_share_the_wire():
    # Two hosts, 50 ms one way, 1.08 MB at 100 Mbit/s, 66 ms of computation: one message alone takes 296 ms.
    sends = ring(2, 1_080_000, 0.05, 0.086, 0.01)
    assert delayed_step(0, sends, 0) == pytest.approx(4 * 0.05 + 0.086 + 0.01)
    assert 0.086 < delayed_step(0.066, sends, 4) < 0.093  # 0.111 if a send waited for those before it
    assert delayed_step(0.066, sends, 8) == pytest.approx(0.086, rel=0.05)
    for hosts in (2, 4):  # gloo's ring takes 4 (W - 1) one-way delays
        assert delayed_step(0, ring(hosts, 0, 0.02, 0, 0), 0) == pytest.approx(4 * (hosts - 1) * 0.02)
    # 20 MiB are ten segments per rank, two of which are in flight.
    assert delayed_step(0, ring(2, 20 * 2**20, 0.02, 0.1, 0), 0) == pytest.approx(2 * 5 * 2 * 0.02 + 0.1)


def test_the_table_compares_the_model_with_what_was_measured():
    link = {"calibration": {}, "mbit": None}

    def condition(delay_ms, all_reduce, **seconds):
        seconds = {name.replace("_", " "): [value] for name, value in seconds.items()}
        parts = dict.fromkeys(("seconds", "cpu_seconds", "relay_seconds"), seconds)
        return link | {"delay_ms": delay_ms, "all_reduce": all_reduce} | parts

    near = condition(0, 0.004, cts_0=0.104, cts_2=0.103, sgd=0.1)
    far = condition(20, 0.084, cts_0=0.184, cts_2=0.103, sgd=0.1)
    rows = {(row["one way, ms"], row["step"]): row for row in slow_network.table_rows([near, far], 1000, 2)}
    assert rows[20, "cts 0"]["model / measured"] == pytest.approx(1)
    assert rows[20, "cts 2"]["model, ms"] == pytest.approx(103)  # the all-reduce's own CPU time is not hidden
    assert rows[20, "sgd"]["model, ms"] == "-"


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")
@pytest.mark.parametrize("stragglers", [False, True])
def test_the_quick_form_on_namespaces(tmp_path, capfd, stragglers):
    slow_network.main(["--quick", "--out", str(tmp_path), *(["--stragglers"] if stragglers else [])])
    if "skipped" in capfd.readouterr().out:
        pytest.skip("no network namespaces here")
    (path,) = tmp_path.glob("*-tiny-2.json")
    results = json.loads(path.read_text())["results"]
    if stragglers:
        assert {row["step"] for row in results["stragglers"]} >= {"cts 0", "cts 4", "sgd"}
        assert min(results["stragglers"][0]["one"]) > 0.005  # 50 ms at every tenth step
    else:
        assert [condition["delay_ms"] for condition in results["conditions"]] == [0, 5, 0, 5]
        assert results["conditions"][1]["calibration"]["round_trip_ms"] >= 10
