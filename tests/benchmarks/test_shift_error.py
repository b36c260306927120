"""The error of a trajectory along an episode: none for the exact shift, and the measurement leaves the run as it is."""

import json

import pytest
import torch

from benchmarks.paper import shift_error
from dist_cts.config import load
from dist_cts.run.config import TrainConfig

KS = (2, 5, 6)


@pytest.fixture
def configured(tasks):
    """configured(algorithm, ...): two tasks, two episodes of K = 6."""

    def configured(algorithm, *more):
        values = ["tasks=[a, b]", f"data.root={tasks}", "batch_size=4", "model.name=tiny", "inner_steps=6"]
        return load(TrainConfig, None, [*values, "episodes=2", "meta_lr=0.3", f"algorithm={algorithm}", *more])

    return configured


def test_the_exact_shift_has_no_error_and_the_accurate_meta_gradient(configured):
    record, _ = shift_error.run(configured("accurate"), KS)
    assert record["error"] == {k: [0.0, 0.0] for k in KS}
    assert record["loss"] == record["exact_loss"]
    assert record["distance"] == record["exact_distance"]
    assert [value for values in record["cosine"].values() for value in values] == pytest.approx([1] * 3, abs=1e-6)


@pytest.mark.parametrize("algorithm", shift_error.METHODS)
def test_others_have_one_and_are_not_disturbed_by_the_measurement(algorithm, configured):
    record, phi = shift_error.run(configured(algorithm), KS)
    assert min(min(errors) for errors in record["error"].values()) > 1e-5
    assert record["length_ratio"].keys() == set(KS)
    assert torch.equal(phi, shift_error.run(configured(algorithm), ())[1])


def test_without_meta_updates_there_is_no_error(configured):
    record, _ = shift_error.run(configured("no_shifting", "meta_lr=1e-30"), KS)
    assert record["error"] == {k: [0.0, 0.0] for k in KS}


def test_the_command_keeps_finished_runs_and_draws(configured, tmp_path, monkeypatch):
    monkeypatch.setattr(shift_error, "KS", (2, 4))
    config = configured("cts")
    values = [f"data.root={config.data.root}", "tasks=[a, b]", "batch_size=4", "model.name=tiny"]
    arguments = ["shift_error.py", "--seeds", "0", "1", "--out", str(tmp_path), *values]
    monkeypatch.setattr("sys.argv", arguments)
    shift_error.main()
    written = tmp_path / "shift_error.json"
    runs = json.loads(written.read_text())["runs"]
    assert len(runs) == 2 * 4
    assert runs["data_order-seed0"]["error"].keys() == {"2", "4"}
    assert (tmp_path / "shift_error.png").stat().st_size > 1000
    monkeypatch.setattr(shift_error, "run", None)
    monkeypatch.setattr(shift_error, "data_order", None)
    shift_error.main()
    assert json.loads(written.read_text())["runs"] == runs
    monkeypatch.setattr("sys.argv", [*arguments, "batch_size=8"])
    with pytest.raises(SystemExit, match="made with other settings"):
        shift_error.main()
