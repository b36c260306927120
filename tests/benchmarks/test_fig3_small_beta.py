"""The error for small beta: in proportion to beta for a smooth loss; finished draws are kept."""

import json

import pytest

from benchmarks.paper import fig3_small_beta


def test_finished_draws_are_kept(tasks, tmp_path, monkeypatch):
    monkeypatch.setattr(fig3_small_beta, "BETAS", (1e-4, 1e-3))
    monkeypatch.setattr(fig3_small_beta, "CASES", {"Softplus, batch 2": ("Softplus", 2)})
    arguments = ["--data", str(tasks / "a"), "--out", str(tmp_path), "--draws"]
    found = []
    for draws in ("1", "2"):
        fig3_small_beta.main([*arguments, draws])
        found.append(json.loads((tmp_path / "fig3_small_beta.json").read_text())["log10_errors"]["Softplus, batch 2"])
    assert found[0] == found[1][:1]
    assert [high - low for low, high in found[1]] == pytest.approx([1, 1], abs=0.05)  # a smooth loss: in proportion
    monkeypatch.setattr(fig3_small_beta, "BETAS", (1e-4, 1e-2))
    with pytest.raises(SystemExit, match="made with other settings"):
        fig3_small_beta.main([*arguments, "2"])
