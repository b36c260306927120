"""Quality by delay: variants trained side by side against a run, the summary over seeds, the quick form."""

import json

import pytest
import torch

from benchmarks import delay_quality
from benchmarks.delay_variants import Variant, meta_train_variants
from dist_cts.algorithms.table import MethodConfig
from dist_cts.checkpoint.phi import load_phi
from dist_cts.run.config import TrainConfig
from dist_cts.run.train import train


def test_variants_side_by_side_equal_runs(tasks, tmp_path):
    config = TrainConfig(
        tasks=["a", "b"], episodes=2, inner_steps=5, meta_lr=0.5, batch_size=8, run_dir=tmp_path / "run", device="cpu",
        model={"name": "tiny"}, data={"root": tasks}, method=MethodConfig(delay=2),
    )  # fmt: skip
    phis, losses = meta_train_variants(config, [Variant(0.1, 0), Variant(0.5, 2), Variant(0.5, 2, crossing=True)])
    train(config)
    expected = load_phi(str(tmp_path / "run" / "phi.safetensors"))
    difference = [max((phi[name] - expected[name]).abs().max().item() for name in expected) for phi in phis]
    assert difference[1] < 1e-5
    assert min(difference[0], difference[2]) > 1e-4
    assert torch.isfinite(losses).all()


def test_seeds_are_paired_with_the_undelayed_run():
    results = {
        delay_quality.key("demo", 0.1, delay, seed): {"loss": 2 + seed + 0.1 * delay, "accuracy": {"a": 0.5, "b": 0.7}}
        for delay in (0, 2)
        for seed in (0, 1, 2)
    }
    results[delay_quality.key("demo", 0.1, 16, 0)] = {"diverged": "step 3"}
    rows = {row["d"]: row for row in delay_quality.summary(results)}
    assert rows[2]["loss - at d = 0"] == {"mean": pytest.approx(0.2), "half": pytest.approx(0, abs=1e-9), "runs": 3}
    assert rows[2]["accuracy"]["mean"] == pytest.approx(60)
    assert (rows[16]["diverged"], rows[16]["loss"]) == (1, None)


def test_a_long_delay_diverges_on_the_synthetic_tasks():
    short, long = (delay_quality.synthetic(0.1, delay, False) for delay in (1, 16))
    assert short["loss"] < 1 < 3 < long["loss"]


@pytest.mark.slow
def test_the_quick_form_of_the_quality(tmp_path):
    work = ["--work", str(tmp_path / "work"), "--data", f"demo={tmp_path / 'data'}"]
    delay_quality.main(["--quick", "--out", str(tmp_path), *work])
    (path,) = tmp_path.glob("*-delay-quality.json")
    results = json.loads(path.read_text())["results"]
    assert results["runs"].keys() == {
        delay_quality.key("demo", v.beta, v.delay, 0, v.crossing) for v in delay_quality.VARIANTS
    }
    assert results["summary"][0]["loss"]["mean"] > 0
