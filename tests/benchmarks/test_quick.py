"""The quick form of every benchmark: that it works, and what its JSON holds."""

import importlib
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import loader, omniglot, report, step_time
from tests.helpers.commands import ROOT


def many_tasks(results):
    assert (results["precision"], results["channels_last"]) == ("bf16", True)
    assert set(results["seconds_per_round"]) == {"1", "4"}
    for seconds in results["seconds_per_round"].values():
        assert set(seconds) == {"eager", "ours"}
        assert all(value > 0 for values in seconds.values() for value in values)


def placement(results):
    assert len(results["costs"]) == 8
    assert results["costs"]["aircraft"] == results["costs"]["stanford-dogs"]  # both of 84 px
    assert all(cost > 0 for cost in results["costs"].values())  # which is larger depends on the machine's load
    assert set(results["seconds_per_step"]) == {"even", "auto"}
    assert all(value > 0 for values in results["seconds_per_step"].values() for value in values)


def characters(results):
    assert set(results["summary"]) == {"random", "cts", "reptile"}
    assert set(results["scan_bpc"]) == {"cts-1", "reptile-1"}
    for row in results["summary"].values():
        assert set(row["bpc"]) == {"mean", "web"}
        assert row["bpc"]["mean"]["mean"] == pytest.approx(sum(row["per_seed"]) / 2)
        assert row["curve"][-1] == pytest.approx(row["bpc"]["mean"]["mean"])


def scaling(results):
    assert set(results["measured"]) == {"1", "2"}
    assert all(value > 0 for seconds in results["measured"].values() for value in seconds["step"])
    assert {row["GPUs"] for row in results["MODEL, not measured"]} >= {8, 64, 1024}


def start_up(results):
    assert set(results["seconds"]) == {"import torch", "device", "stream"}
    assert all(value > 0 for (value,) in results["seconds"].values())


def time_to_quality(results):
    (seed,) = results["seeds"]
    for points in seed["georgian"].values():
        assert [point["inner_steps"] for point in points] == [6, 12]
        assert 0 < points[0]["seconds"] < points[1]["seconds"]


def loaders(results):
    assert set(results["decoded"]) == set(loader.LOADERS)
    for result in results["decoded"].values():
        assert result["batches"] > 0
        assert all(seconds > 0 for seconds in result["seconds"] + result["cpu_seconds"])


def storage(results):
    (case,) = results["cases"]
    raw = case["bytes_an_image"]["raw"]
    assert 0 < raw - 3 * case["pixels"] ** 2 < 100  # the pixels and a record, no share of a page
    assert case["bytes_an_image"]["jpg"] < raw
    assert 20 < case["jpg_psnr_db"] < 50
    assert case["streamed"].keys() == case["written"].keys() == {"raw 1", "jpg 1"}
    assert min(speed["median"] for speed in (*case["streamed"].values(), *case["resident"].values())) > 0


def step_times(results):
    assert results["settings"] == {"precision": "fp32", "channels_last": False, "deterministic": True}
    (result,) = results["cases"].values()
    assert set(result["seconds_per_step"]) == {"cts", "sgd", "ddp", "released"}
    for name, seconds in result["seconds_per_step"].items():
        assert len(seconds) == len(result["cpu_seconds_per_step"][name]) >= 3
        assert all(value > 0 for value in seconds)
    assert all(result["seconds_of_parts"][part] > 0 for part in ("forward, backward", "wait", "all-reduce", "shift"))


def step_trace(results):
    (found,) = results["tasks"].values()
    assert all(value > 0 for value in (*found["kernels"].values(), *found["busy_ms"].values(), found["step_ms"]))
    assert 0 < found["meta_update_share"] < 1
    assert 0 < found["meta_update_share_of_host"] < 1
    assert 0 <= found["idle_share"] < 1
    assert found["by_kernel"]


def soak(results):
    assert results["survived"] == results["kills"] >= 2
    assert results["leftovers"] == 0
    assert len(results["hits"]) == results["kills"]


def endurance(results):
    assert results["steps"] == 500
    rows = {row["figure"]: row for row in results["compared"]}
    assert {"open files", "threads", "resident memory, MiB", "metrics.jsonl, bytes per step"} <= rows.keys()
    assert rows["open files"]["last tenth"] <= rows["open files"]["first tenth"] + 4
    assert results["beside_fresh"]["CPU time"]["low"] > 0


def pools(results):
    assert [(case["N"], case["T"]) for case in results["cases"]] == [(2, 4), (2, 8)]
    assert all(case["peak_mib"] > 10 and case["seconds_per_step"] > 0 for case in results["cases"])


def augmentation(results):
    assert {"none", "resized crop", "color jitter", "erasing", "mixup", "cutmix", "all"} == set(results["settings"])
    assert set(results["seconds_per_step"]) == set(results["settings"])
    assert all(value > 0 for values in results["seconds_per_step"].values() for value in values)


def together(results):
    (seconds,) = results["seconds_per_task"].values()
    assert set(seconds) == {"alone", "together"}
    assert all(value > 0 for values in seconds.values() for value in values)


BENCHMARKS = {
    "augmentation": (augmentation, ()),
    "characters": (characters, ()),
    "soak": (soak, ()),
    "endurance": (endurance, ()),
    "many_tasks": (many_tasks, ("--precision", "bf16", "--channels-last")),
    "placement": (placement, ()),
    "pools": (pools, ()),
    "scaling": (scaling, ()),
    "loader": (loaders, ()),
    "storage": (storage, ("--workers", "1")),
    "start_up": (start_up, ()),
    "step_trace": (step_trace, ()),
    "time_to_quality": (time_to_quality, ()),
    "together": (together, ()),
}
SLOW = ("characters", "endurance", "pools", "soak", "start_up", "time_to_quality")  # they start the commands of launch/


def results_in(folder, name):
    """The results in the one dated file that a benchmark has written."""
    (path,) = folder.glob("20??-??-??-*.json")
    record = json.loads(path.read_text())
    assert path.name == f"{record['date'][:10]}-{name.replace('_', '-')}.json"
    assert record["command"].startswith("python ")
    assert {"commit", "device", "cores", "packages", "threads"} <= record.keys()
    assert "host" not in record
    return record["results"]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow, pytest.mark.timeout(600)] * (name in SLOW)) for name in BENCHMARKS],
)
def test_quick_form(name, tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("DIST_CTS_DATA", raising=False)
    check, arguments = BENCHMARKS[name]
    importlib.import_module(f"benchmarks.{name}").main(["--quick", "--out", str(tmp_path), *arguments])
    torch.set_num_threads(1)  # as tests/conftest.py has it
    check(results_in(tmp_path, name))
    assert "\n|--" in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_few_shot_tasks_of_characters(tmp_path):
    generator = np.random.default_rng(0)
    for character in range(60):
        (tmp_path / "raw" / f"{character:02}").mkdir(parents=True)
        for drawing in range(20):
            image = Image.fromarray(generator.integers(0, 255, (28, 28), dtype=np.uint8))
            image.save(tmp_path / "raw" / f"{character:02}" / f"{drawing:02}.png")
    omniglot.main(
        ["--quick", "--root", str(tmp_path / "raw"), "--out", str(tmp_path), "--methods", "reptile", "fomaml"]
    )
    results = results_in(tmp_path, "omniglot")
    assert results["characters"] == {"training": 45, "validation": 10, "new": 5}
    assert results["setting"] == {"reptile": "1", "fomaml": "0.3"}
    assert set(results["accuracy"]) == {"random", "reptile", "fomaml"}
    for row in results["accuracy"].values():
        assert all(0 <= cell["mean"] <= 100 for cell in (row["1-shot"], row["5-shot"]))


@pytest.mark.slow
def test_a_script_starts_its_own_ranks(tmp_path):
    command = [sys.executable, step_time.__file__, "--quick", "--out", tmp_path]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=250)
    step_times(results_in(tmp_path, "step_time"))


def test_a_paper_script_finds_its_imports_from_any_folder(tmp_path):
    script = ROOT / "benchmarks" / "paper" / "fig7.py"
    done = subprocess.run([sys.executable, script, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "meta_test.json" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "written"),
    [
        ((), ["results"]),
        (("--quick",), []),
        (("--out", "other"), ["other"]),
        (("--quick", "--out", "other"), ["other"]),
    ],
)
def test_results_are_written_by_a_full_run_or_to_out(arguments, written, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    report.publish("x", {"value": 1}, [{"a": 1}], report.parser("x").parse_args(arguments))
    assert [path.parent.name for path in tmp_path.glob("*/*-x.json")] == written
