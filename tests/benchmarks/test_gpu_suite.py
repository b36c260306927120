"""The suite for one GPU runs on a CPU, and reports what failed."""

import json
import subprocess
import sys

import pytest

from tests.helpers.commands import ENVIRONMENT, ROOT

SUITE = ROOT / "benchmarks" / "gpu_suite.sh"
BENCHMARKS = {"step-time-fp32", "step-time-tf32", "step-time-bf16", "many-tasks-fp32", "many-tasks-bf16", "loader"}


def run_suite(out, *arguments, **environment):
    command = [SUITE, "--out", out, "--device", "cpu", "--quick", *arguments]
    variables = {**ENVIRONMENT, "PYTHON": sys.executable, **environment}
    return subprocess.run(command, cwd=out.parent, env=variables, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_every_step_passes_on_a_cpu(tmp_path):
    done = run_suite(tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    summary = (tmp_path / "out" / "summary.txt").read_text()
    outcomes = {line.split()[0]: line.split()[-1] for line in summary.splitlines()}
    assert outcomes.keys() == BENCHMARKS | {"tests", "demo", "resume", "trace-fp32", "trace-bf16"}
    assert set(outcomes.values()) == {"passed"}
    for name in BENCHMARKS | {"trace-fp32", "trace-bf16"}:
        (path,) = (tmp_path / "out" / name).glob("20??-??-??-*.json")
        assert json.loads(path.read_text())["results"]
    assert (tmp_path / "out" / "demo" / "meta_test" / "meta_test.json").exists()
    assert summary in done.stdout


def test_a_failed_step_does_not_stop_the_next(tmp_path):
    done = run_suite(tmp_path / "out", "tests", "loader", PYTHON="false")
    assert done.returncode == 1
    lines = (tmp_path / "out" / "summary.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["tests", "loader"]
    assert all(line.endswith("failed with exit code 1") for line in lines)


@pytest.mark.parametrize("arguments", [["no-such-step"], ["--minutes", "x"], ["--device", "tpu"], ["--data"]], ids=str)
def test_bad_usage(arguments, tmp_path):
    done = run_suite(tmp_path / "out", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("gpu_suite.sh: ")
