"""The public API in a script: train, TrainConfig, meta_test, MetaTestConfig, load_phi."""

import json
import os
import subprocess
import sys

import pytest
import torch

from dist_cts import load_phi
from tests.helpers.commands import ROOT, TORCHRUN

SCRIPT = """\
from dist_cts import MetaTestConfig, TrainConfig, meta_test, train
common = {{"model": {{"name": "tiny"}}, "data": {{"root": {root!r}}}, "batch_size": 8}}
train(TrainConfig(tasks=["a", "b"], episodes=2, inner_steps=5, meta_lr=0.5, reduction="ordered", **common))
meta_test(MetaTestConfig(targets=["c"], seeds=2, steps=4, eval_points=1, **common), ["runs/cts/phi.safetensors"])
"""


def run_script(launcher, tasks, folder):
    """phi of the script, started in `folder` by `launcher`."""
    folder.mkdir()
    (folder / "script.py").write_text(SCRIPT.format(root=str(tasks)))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*launcher, "script.py"], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("done: 10 steps") == 1
    results = json.loads((folder / "runs/cts/meta_test/meta_test.json").read_text())
    assert set(results["summary"]) == {"random", "cts"}
    return load_phi(folder / "runs/cts/phi.safetensors")


def test_a_short_script_trains_and_meta_tests_alone_and_under_torchrun(tasks, tmp_path):
    alone = run_script([sys.executable], tasks, tmp_path / "alone")
    on_ranks = run_script([*TORCHRUN, "--standalone", "--nproc_per_node=2"], tasks, tmp_path / "ranks")
    assert alone.keys() == on_ranks.keys()
    for name, tensor in alone.items():
        assert torch.equal(tensor, on_ranks[name]), name


def test_an_unknown_attribute_is_an_error():
    with pytest.raises(ImportError, match="cannot import name 'trian'"):
        exec("from dist_cts import trian")
