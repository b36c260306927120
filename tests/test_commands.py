"""The installed commands: from a wheel, in an empty folder, configurations by name, the demo without arguments."""

import json
import os
import shutil
import subprocess
import sys
import zipfile

import pytest

from dist_cts import config
from dist_cts.commands import COMMANDS, plot, train
from dist_cts.commands.demo import draw_missing
from tests.helpers.commands import ENVIRONMENT, ROOT, TORCHRUN

SHORT = ["tasks=[digits, colours]", "model={name: tiny}", "episodes=1", "inner_steps=4", "batch_size=8", "log_every=2"]
SHORT += ["device=cpu"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel of this checkout, unpacked."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("dist_cts", "configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True)
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(out)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True, timeout=250)
    with zipfile.ZipFile(next(out.glob("*.whl"))) as wheel:
        wheel.extractall(out / "site")
    return out / "site"


@pytest.fixture
def run(installed, tmp_path):
    """run(*arguments, launcher=...): a command of the wheel in an empty folder; exit code, stdout and stderr."""

    def run(*arguments, launcher=(sys.executable, "-m"), folder=tmp_path):
        command = [*launcher, "dist_cts", *map(str, arguments)]
        environment = {**ENVIRONMENT, "PYTHONPATH": str(installed)}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=250)
        return done.returncode, done.stdout, done.stderr

    return run


def test_the_wheel_has_the_configurations_and_the_command(installed):
    def files(folder):
        return {path.relative_to(folder): path.read_text() for path in folder.rglob("*.yaml")}

    assert files(installed / "dist_cts" / "configs") == files(ROOT / "configs")
    (entry_points,) = installed.glob("*.dist-info/entry_points.txt")
    assert "dist-cts = dist_cts.commands:main" in entry_points.read_text()


def test_train_draws_the_demo_once_for_all_ranks_and_plot_draws_the_run(run, tmp_path):
    code, _, err = run("train", *SHORT, launcher=(*TORCHRUN, "--standalone", "--nproc_per_node=2", "-m"))
    assert code == 0, err
    lines = [line for line in err.splitlines() if "torch" not in line.lower() and not line.startswith("*")]
    assert lines[0] == "no --config given: training the demo, 8 small tasks drawn by dist_cts"
    for name in ("digits", "colours"):
        assert err.count(f"drawing task data/demo/{name}\n") == 1
    assert (tmp_path / "runs/demo/phi.safetensors").exists()
    code, _, err = run("train", "--config", "demo", *SHORT)
    assert code == 0, err
    assert "drawing" not in err
    assert "no --config" not in err
    code, out, err = run("plot", "runs/demo", "--out", "curves.png")
    assert (code, out) == (0, "curves.png: written\n"), err
    assert (tmp_path / "curves.png").stat().st_size > 1000
    assert {path.name for path in tmp_path.iterdir()} == {"data", "runs", "curves.png"}


def test_configurations_based_on_the_demo_draw_its_tasks_and_a_users_own_do_not(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"base: {config.CONFIGS / 'demo.yaml'}\n")
    for file in (mine, config.CONFIGS / "long_horizon.yaml"):
        draw_missing(file, tmp_path, ["colours"])
        assert list(tmp_path.iterdir()) == [mine]
    for number, name in enumerate(("anil.yaml", "partial/head_only.yaml")):
        draw_missing(config.CONFIGS / name, tmp_path / str(number), ["colours"])
        assert (tmp_path / str(number) / "colours/test.json").exists()


def test_the_commands_are_listed_without_torch(run):
    code, out, _ = run("--help")
    assert code == 0
    assert all(f"\n    {name}" in out for name in ("prepare", "train", "meta-test", "synthetic", "plot"))
    code, _, err = run("trian")
    assert code == 2
    assert err == f"error: unknown command 'trian'; did you mean 'train'? commands: {', '.join(COMMANDS)}\n"
    check = "import sys, dist_cts.commands.train, dist_cts.commands.meta_test; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)}).returncode == 0


def test_a_configuration_is_found_by_path_or_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config.find("paper/cts") == ROOT / "configs/paper/cts.yaml"
    (tmp_path / "mine.yaml").touch()
    assert str(config.find("mine.yaml")) == "mine.yaml"
    with pytest.raises(FileNotFoundError, match=r"config file not found: configs/paper/ctss.yaml .*: paper/cts, "):
        config.find("configs/paper/ctss.yaml")


def test_an_unknown_configuration_is_one_line(capsys):
    assert train.main(["--config", "dmo"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: config file not found: dmo (working directory: ")
    assert "; nearest configurations: demo, " in line


def test_plot_names_a_folder_that_is_not_a_run_and_skips_a_torn_line(tmp_path, capsys):
    arguments = [str(tmp_path), "--out", str(tmp_path / "a.png")]
    assert plot.main(arguments) == 2
    assert f"{tmp_path}/metrics.jsonl not found; expected a run folder" in capsys.readouterr().err
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1, "ta')
    assert plot.main(arguments) == 2
    assert "no metrics recorded yet" in capsys.readouterr().err
    metrics.write_text(json.dumps({"step": 1, "task": "a", "loss": 2.0, "accuracy": 0.5}) + '\n{"step": 2, "ta')
    assert plot.main(arguments) == 0
    assert os.path.getsize(tmp_path / "a.png") > 1000
