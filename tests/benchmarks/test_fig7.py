"""Figure 7 from a meta-test of snapshots."""

import json
import sys
from pathlib import Path

import pytest

PAPER = Path(__file__).parent.parent.parent / "benchmarks" / "paper"


@pytest.fixture
def fig7(monkeypatch):
    monkeypatch.syspath_prepend(str(PAPER))
    import fig7

    return fig7


def test_the_curve_is_ordered_by_step_and_drawn_without_the_other_starts(fig7, tmp_path, monkeypatch):
    summary = {
        start: {"pets": {"accuracy": 10.0 + i, "ci95": 1.0}} for i, start in enumerate(("a@20", "a@5", "random"))
    }
    document = {"starts": {"a@20": {"step": "20"}, "a@5": {"step": "5"}}, "summary": summary}
    assert fig7.curves(document) == {"pets": {"a": [(5, 11.0, 1.0), (20, 10.0, 1.0)]}}
    (tmp_path / "meta_test.json").write_text(json.dumps(document))
    monkeypatch.setattr(sys, "argv", ["fig7.py", str(tmp_path / "meta_test.json"), "--out", str(tmp_path)])
    fig7.main()
    assert (tmp_path / "fig7.png").stat().st_size > 1000
    assert json.loads((tmp_path / "fig7.json").read_text())["curves"] == {
        "pets": {"a": [[5, 11.0, 1.0], [20, 10.0, 1.0]]}
    }
