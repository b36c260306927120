"""Raw tasks need only torch and common packages: no FFCV, no package metadata."""

import json
import os
import subprocess
import sys

import pytest

from tests.helpers.commands import ENVIRONMENT, ROOT

# Python imports this at its start.
BARE = """
import importlib.abc, importlib.metadata, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("ffcv", "numba", "cv2"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

def version(name):
    raise importlib.metadata.PackageNotFoundError(name)

sys.meta_path.insert(0, Blocked())
importlib.metadata.version = version
"""


@pytest.fixture
def bare(tmp_path):
    """bare(script, *arguments): runs a command of launch/ to its end where FFCV and all metadata are missing."""
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "sitecustomize.py").write_text(BARE)
    path = os.pathsep.join([str(tmp_path / "bare"), str(ROOT), os.environ.get("PYTHONPATH", "")])

    def run(script, *arguments):
        command = [sys.executable, str(ROOT / "launch" / script), *map(str, arguments)]
        done = subprocess.run(
            command, cwd=tmp_path, env={**ENVIRONMENT, "PYTHONPATH": path}, capture_output=True, text=True
        )
        return done.returncode, done.stdout + done.stderr

    return run


def test_prepare_train_and_meta_test_raw_tasks_without_ffcv_and_metadata(bare, tmp_path):
    code, out = bare("prepare.py", "embedded:digits", "--out", tmp_path / "data", "--limit", 64)
    assert code == 0, out
    (task,) = (folder.name for folder in (tmp_path / "data").iterdir())
    shared = f"batch_size: 8\ndevice: cpu\nmodel: {{name: tiny}}\ndata: {{root: {tmp_path / 'data'}}}\n"
    train, test = tmp_path / "train.yaml", tmp_path / "test.yaml"
    train.write_text(f"tasks: [{task}]\nepisodes: 1\ninner_steps: 4\nrun_dir: {tmp_path / 'run'}\n{shared}")
    code, out = bare("train.py", "--config", train)
    assert code == 0, out
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["packages"]["ffcv"] is None
    test.write_text(f"targets: [{task}]\nrandom: false\nseeds: 1\nsteps: 2\nschedule: constant\n{shared}")
    code, out = bare("meta_test.py", "--config", test, "--phi", tmp_path / "run" / "phi.safetensors")
    assert code == 0, out
