"""Figure 7 from a meta-test of snapshots, and from a meta-test of one phi per run with the runs' training losses."""

import json

from benchmarks.paper import fig7


def draw(tmp_path, document, *arguments):
    """fig7.json of a meta-test; the picture is there too."""
    (tmp_path / "meta_test.json").write_text(json.dumps(document))
    fig7.main([str(tmp_path / "meta_test.json"), "--out", str(tmp_path), *map(str, arguments)])
    assert (tmp_path / "fig7.png").stat().st_size > 1000
    return json.loads((tmp_path / "fig7.json").read_text())


def test_curves_are_ordered_by_step_and_leave_out_other_starts(tmp_path):
    summary = {
        start: {"pets": {"accuracy": 10.0 + i, "ci95": 1.0}} for i, start in enumerate(("a@20", "a@5", "random"))
    }
    document = {"starts": {"a@20": {"step": "20"}, "a@5": {"step": "5"}}, "summary": summary}
    assert fig7.curves(document) == {"pets": {"a": [(5, 11.0, 1.0), (20, 10.0, 1.0)]}}
    assert draw(tmp_path, document)["curves"] == {"pets": {"a": [[5, 11.0, 1.0], [20, 10.0, 1.0]]}}


def test_bars_and_losses_of_runs_where_a_resumed_run_counts_once(tmp_path):
    run = tmp_path / "cts"
    run.mkdir()
    losses = [(2, "a", 5.0), (2, "b", 3.0), (4, "a", 9.0), (4, "a", 1.0), (4, "b", 2.0)]
    records = [{"cumulative_inner_steps": step, "task": task, "loss": loss} for step, task, loss in losses]
    records.append({"cumulative_inner_steps": 4, "task": "a", "test_loss": 7.0})
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    document = {"starts": {"cts": {}}, "summary": {"cts": {"pets": {"accuracy": 10.0, "ci95": 1.0}}}}
    found = draw(tmp_path, document, "--runs", run)
    assert found["losses"] == {"cts": [[2, 4], [4.0, 1.5]]}
    assert found["curves"] == {}
