"""The commands of launch/, as a user starts them."""

import json
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import safetensors.torch
import torch

from dist_cts import models
from dist_cts.checkpoint.phi import SEAL, WRITER
from dist_cts.models import ModelConfig
from tests.helpers.commands import ENVIRONMENT, assert_equal, own_lines, phi, records


@pytest.fixture
def config(tmp_path, tasks):
    path = tmp_path / "small.yaml"
    path.write_text(
        f"""
tasks: [a, b, {{name: c, classes: 5}}, d]
episodes: 2
inner_steps: 5
meta_lr: 0.1
batch_size: 8
log_every: 5
run_dir: {tmp_path / "run"}
device: cpu
model: {{name: tiny}}
data: {{root: {tasks}}}
checkpoint: {{every_steps: 4}}
"""
    )
    return path


@pytest.fixture
def run(start):
    """run(script, *arguments, ranks=None) -> exit code, stdout, stderr."""
    return lambda *arguments, ranks=None: start(*arguments, ranks=ranks).finish()


def test_torchrun_leaves_a_complete_run_folder_and_phi_loads(run, config, tmp_path):
    code, _, err = run("train.py", "--config", config, "eval_every=10", "snapshot_every=5", ranks=2)
    assert code == 0, err
    folder = tmp_path / "run"
    assert "cts: 1 gradient evaluations per task and meta-update" in err
    assert own_lines(err)[-1] == f"done: 10 steps, phi is in {folder / 'phi.safetensors'}"
    assert {path.name for path in folder.iterdir()} >= {
        "config.yaml", "environment.json", "metrics.jsonl", "tensorboard", "checkpoints", "phi.safetensors",
    }  # fmt: skip
    train = [record for record in records(folder) if "loss" in record]
    assert [(r["step"], r["episode"], r["inner_step"], r["task"]) for r in train] == [
        (step, step // 5, 5, task) for step in (5, 10) for task in "abcd"
    ]
    assert all(r["steps_per_second"] > 0 and r["wait_seconds"] >= 0 and 0 <= r["accuracy"] <= 1 for r in train)
    assert all(record["cumulative_inner_steps"] == 4 * record["step"] for record in records(folder))
    tested = {record["task"] for record in records(folder) if "test_accuracy" in record}
    assert tested == set("abcd")
    assert list((folder / "tensorboard").iterdir())
    model, _ = models.build(ModelConfig(name="tiny"), 9, "any")
    missing, unexpected = model.load_state_dict(phi(folder), strict=False)
    assert unexpected == []
    assert {name for name in missing if "running" not in name and "num_batches" not in name} == {"fc.weight", "fc.bias"}
    half, end = (safetensors.safe_open(folder / "snapshots" / f"phi_{step}.safetensors", "pt") for step in (5, 10))
    assert half.metadata() == {
        "model": "tiny", "width": "1.0", "algorithm": "cts", "step": "5", "tasks": "4", "cumulative_inner_steps": "20",
        **WRITER, SEAL: half.metadata()[SEAL],
    }  # fmt: skip
    assert not torch.equal(half.get_tensor("conv1.weight"), end.get_tensor("conv1.weight"))
    assert torch.equal(phi(folder)["conv1.weight"], end.get_tensor("conv1.weight"))
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["world_size"] == 2
    assert environment["packages"]["torch"] == torch.__version__.split("+")[0]


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(run, config, tmp_path):
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        code, _, err = run("train.py", "--config", config, f"run_dir={tmp_path / name}", f"seed={seed}")
        assert code == 0, err
    assert_equal(phi(tmp_path / "one"), phi(tmp_path / "two"))
    assert not torch.equal(phi(tmp_path / "one")["conv1.weight"], phi(tmp_path / "other")["conv1.weight"])


def test_a_stop_request_writes_a_checkpoint_and_the_same_command_finishes_with_the_same_bits(
    run, start, config, tmp_path
):
    keys = ["episodes=4000", "log_every=50", "checkpoint.every_steps=0", "reduction=ordered", "snapshot_every=25"]
    process = start("train.py", "--config", config, *keys)
    while not (tmp_path / "run" / "metrics.jsonl").exists() or not records(tmp_path / "run"):
        assert process.running(), process.finish()
        time.sleep(0.1)
    process.signal(signal.SIGTERM)
    code, _, err = process.finish()
    assert code == 75, err
    stopped = int(re.search(r"stopped at step (\d+) with a checkpoint", err)[1])
    episodes = stopped // 5 + 2
    keys[0] = f"episodes={episodes}"
    code, _, err = run("train.py", "--config", config, *keys)
    assert code == 0, err
    assert f"resuming from checkpoint at step {stopped}" in err
    code, _, err = run("train.py", "--config", config, *keys, f"run_dir={tmp_path / 'whole'}", ranks=2)
    assert code == 0, err
    assert_equal(phi(tmp_path / "run"), phi(tmp_path / "whole"))
    names = {f"phi_{step}.safetensors" for step in range(25, 5 * episodes + 1, 25)}
    for folder in (tmp_path / "run" / "snapshots", tmp_path / "whole" / "snapshots"):
        assert {path.name for path in folder.iterdir()} == names
    for name in names:
        assert_equal(*(safetensors.torch.load_file(tmp_path / run / "snapshots" / name) for run in ("run", "whole")))


@pytest.mark.parametrize(
    ("keys", "code", "message"),
    [
        (["innr.lr=1"], 2, "unknown key 'innr'; did you mean 'inner'?"),
        (["batch_size=x"], 2, "error: command line: batch_size is 'x': expected an integer"),
        (["algorithm=maml"], 2, "algorithm='maml': unknown; did you mean"),
        (["init=ResNet18_Weights.BEST"], 2, "torchvision has no weights ResNet18_Weights.BEST; see"),
        (["model.name=vgg"], 2, "model.name='vgg': choose one of resnet20"),
        (["tasks=[a, nothere]"], 2, "; prepared: a, b, c, d"),
        (["step=graph"], 2, "step=graph needs a GPU, the device is cpu; set step=eager"),
        (["tasks=[{name: a, classes: 7}]"], 2, "task a: the config says 7 classes, "),
        (["tasks=[a, a]"], 2, "tasks: duplicate task name 'a' in a, a"),
        (["inner.lr=1e30"], 1, "the update of task a, b, c, d is not finite"),
    ],
)
def test_a_mistake_is_one_line_with_its_exit_code(run, config, keys, code, message):
    returned, _, err = run("train.py", "--config", config, *keys)
    assert returned == code
    assert err.count("error:") == 1
    assert message in err
    assert "Traceback" not in err


def test_a_missing_task_of_one_rank_ends_all_ranks_with_one_line(start, config):
    # Under 30 s, on a machine that does nothing else; most of it is the import of torch.
    code, _, err = start("train.py", "--config", config, "tasks=[a, nothere]", ranks=2).finish()
    assert code == 1  # torchrun's own, whatever the ranks gave
    assert err.count("error:") == 1, err
    assert "error: rank 1: " in err
    assert "no prepared task 'nothere' in /" in err


def test_a_world_size_that_fits_no_layout_is_one_line(run, config):
    code, _, err = run("train.py", "--config", config, "tasks=[a, b]", ranks=3)
    assert code == 1
    assert err.count("error: ") == 1
    assert "2 tasks do not fit evenly on 3 ranks" in err


def test_fresh_starts_from_scratch_and_keeps_the_old_folder(run, start, config, tmp_path):
    for seed in (0, 1, 2):
        code, _, err = start("train.py", "--config", config, "--fresh", f"seed={seed}", forked=2).finish()
        assert code == [0, 0], err
        assert "resuming" not in err
        assert {path.name for path in tmp_path.glob("run*")} == {"run", *(f"run.{n + 1}" for n in range(seed))}
    kept = [phi(tmp_path / name) for name in ("run.1", "run.2", "run")]
    assert not any(torch.equal(kept[n]["conv1.weight"], kept[n - 1]["conv1.weight"]) for n in range(3))
    assert "seed: 0" in (tmp_path / "run.1" / "config.yaml").read_text()


def test_a_second_run_in_the_folder_is_refused_even_a_fresh_one(run, start, config, tmp_path):
    process = start("train.py", "--config", config, "episodes=100000")
    try:
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            assert process.running(), process.finish()
            time.sleep(0.1)
        for arguments in ([], ["--fresh"]):
            code, _, err = run("train.py", "--config", config, *arguments)
            assert code == 2
            holder = f"another run (process {process.process.pid} on {socket.gethostname()})"
            assert f"error: {tmp_path / 'run'} is in use by {holder}: stop it, or choose another run_dir" in err
    finally:
        process.signal(signal.SIGTERM)
        assert process.finish()[0] == 75
    assert not (tmp_path / "run.1").exists()


def test_meta_test_reports_every_target_start_and_seed(run, config, tmp_path, tasks):
    assert run("train.py", "--config", config)[0] == 0
    settings = tmp_path / "test.yaml"
    settings.write_text(
        f"targets: [a, b]\nseeds: 2\nsteps: 6\nbatch_size: 8\neval_points: 2\ndevice: cpu\nmodel: {{name: tiny}}\n"
        f"data: {{root: {tasks}}}\ninner: {{lr: 0.05}}\n"
    )
    arguments = ["--config", settings, "--phi", f"ours={tmp_path / 'run' / 'phi.safetensors'}"]
    code, out, err = run("meta_test.py", *arguments, ranks=2)
    assert code == 0, err
    assert re.search(r"\| initialization +\| a \| b \| average \|", out)
    done = re.findall(r"^(\w, \w+, seed \d): accuracy [\d.]+ %$", err, re.MULTILINE)
    assert len(done) == len(set(done)) == 2 * 2 * 2  # the ranks share the jobs
    result = json.loads((tmp_path / "run" / "meta_test" / "meta_test.json").read_text())
    assert set(result["summary"]) == {"random", "ours"}
    assert len(result["results"]) == 2 * 2 * 2
    assert result["starts"]["ours"]["cumulative_inner_steps"] == "40"
    assert {point["step"] for r in result["results"] for point in r["curve"]} == {3, 6}
    # Every one of the 60 test images counts: accuracies are multiples of 1 / 60, and not all of 1 / 56.
    accuracies = [point["accuracy"] * 60 for r in result["results"] for point in r["curve"]]
    assert accuracies == pytest.approx([round(a) for a in accuracies], abs=1e-4)
    assert (tmp_path / "run" / "meta_test" / "meta_test.png").stat().st_size > 1000
    before = (tmp_path / "run" / "meta_test" / "meta_test.md").read_text()
    jobs = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "meta_test" / "jobs").iterdir()}
    for start in result["summary"]:
        for target in "ab":
            curves = [r["curve"] for r in result["results"] if (r["start"], r["target"]) == (start, target)]
            cell = result["summary"][start][target]
            assert cell["seeds"] == [100 * curve[-1]["accuracy"] for curve in curves]
            assert cell["best_seeds"] == [100 * max(point["accuracy"] for point in curve) for curve in curves]
    interrupted = next(iter(jobs))
    interrupted.unlink()
    code, again, err = run("meta_test.py", *arguments)  # one job is left and gives the same result
    assert code == 0, err
    assert before in again
    done_again = [path for path, written in jobs.items() if path.stat().st_mtime_ns != written]
    assert done_again == [interrupted]
    code, _, err = run("meta_test.py", *arguments, "model.width=2", "random=false")
    assert code == 2
    assert "phi.safetensors does not fit" in err


@pytest.mark.parametrize("script", ["train.py", "meta_test.py", "prepare.py"])
def test_help_is_printed(run, script):
    code, out, _ = run(script, "--help")
    assert code == 0
    assert len(out.splitlines()) > 20


def test_import_dist_cts_is_light_and_without_ffcv(run):
    check = (
        "import sys, dist_cts, dist_cts.config; assert 'torch' not in sys.modules; "
        "import dist_cts.run.train; assert 'ffcv' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", check], check=True, env=ENVIRONMENT)
