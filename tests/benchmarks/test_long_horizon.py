"""The long-horizon study: how it tunes, resumes, orders its runs and tests its contrasts."""

import json
import math
from concurrent.futures import Future

import pytest
from scipy import stats

from benchmarks.paper import long_horizon, long_horizon_figures
from benchmarks.paper import long_horizon_report as report
from benchmarks.paper.long_horizon_runs import Run, Study, execute


@pytest.fixture
def study(tasks, tmp_path):
    """Two tasks at a size for tests."""
    training, testing = tmp_path / "training.yaml", tmp_path / "testing.yaml"
    shared = f"batch_size: 4\nmodel: {{name: tiny}}\ndata: {{root: {tasks}}}\n"
    training.write_text(f"tasks: [a, b]\n{shared}")
    testing.write_text(f"targets: [b]\nseeds: 1\nsteps: 3\neval_points: 1\n{shared}")
    return Study(training, testing, ("a",), tmp_path / "work", tmp_path / "results", 12, 4, (4, 2))


def submitted(score):
    """A queue whose runs have the validation accuracy `score(run)`, None if they diverge, and the runs that it got."""
    seen = []

    def submit(run):
        seen.append(run)
        future = Future()
        value = score(run)
        future.set_result({} if value is None else {"accuracy": {"a": [value]}})
        return future

    return submit, seen


def decades(value, best):
    return -abs(math.log10(value / best))


@pytest.mark.parametrize("best", [1e-4, 0.003, 0.1, 0.3, 30.0])
def test_tuning_scans_four_decades_extends_at_an_edge_and_refines(best):
    submit, seen = submitted(lambda run: decades(run.beta, best))
    assert long_horizon.tune(submit, "cts", 1000) == (best, ())
    betas = {run.beta for run in seen}
    assert {0.001, 0.01, 0.1, 1.0, 10.0} <= betas
    assert min(betas) < best < max(betas)
    assert {run.kind for run in seen} == {"tune"}
    assert {run.seed for run in seen} == {100, 101}


def test_a_diverged_beta_is_not_chosen():
    submit, _ = submitted(lambda run: None if run.beta > 0.05 else run.beta)
    assert long_horizon.tune(submit, "cts", 1000) == (0.03, ())


@pytest.mark.parametrize("unseen", [True, False])
def test_lambda_and_the_batch_of_the_meta_gradient_are_tuned_too(unseen, study):
    def accuracy(run):
        imaml = study.training(run).method
        gain = 1 if (imaml.gradient_batch == "next") == unseen else 0
        return decades(run.beta, 30) + decades(imaml.imaml.lam, 0.2) + gain

    submit, seen = submitted(accuracy)
    more = ("method.imaml.lam=0.2", *["method.gradient_batch=next"] * unseen)
    assert long_horizon.tune(submit, "imaml", 4) == (30, more)
    assert len({run.name for run in seen}) == len(seen) == 25 + 1 + 2 + 3


def test_the_first_horizon_comes_before_the_others_and_seeds_are_balanced_over_the_methods():
    stages = long_horizon.plan([1000, 100], ["mtl"], seeds=2, main_seeds=3)
    runs = [
        (method, K, seed) for kind, cells, seeds in stages if kind == "main" for seed in seeds for method, K in cells
    ]
    assert len(set(runs)) == len(runs) == 2 * (2 * 4 + 1) + 4 + 4
    tuned = set()
    for kind, cells, _ in stages:  # no run before its beta
        tuned |= set(cells) if kind == "tune" else set()
        assert kind == "tune" or set(cells) - {("mtl", 1000)} <= tuned
    assert runs[:8] == [(method, 1000, seed) for seed in (0, 1) for method in long_horizon.COMPARED]
    assert runs[8:10] == [("mtl", 1000, 0), ("mtl", 1000, 1)]


def test_a_finished_run_is_read_and_other_settings_are_refused(study):
    run = Run("reptile", 4, 1.0, 0)
    record = execute(study, run)
    assert record["steps"] == [12]
    assert set(record["loss"]) == {"a", "b"}
    assert len(record["accuracy"]["b"]) == 1
    path = study.results / f"{run.name}.json"
    assert execute(study, run) == record == json.loads(path.read_text())
    study.config.write_text(study.config.read_text() + "inner: {lr: 0.5}\n")
    with pytest.raises(SystemExit, match=r"made with other settings \(training\.inner\.lr is 0\.01, wanted 0\.5\)"):
        execute(study, run)


def test_a_stored_run_stays_valid_when_the_configuration_gains_a_key(study):
    run = Run("cts", 4, 0.1, 100, "pilot")
    execute(study, run)
    path = study.results / f"{run.name}.json"
    stored = json.loads(path.read_text())
    del stored["request"]["training"]["loss_limit"], stored["request"]["training"]["method"]["leap"]["head"]
    path.write_text(json.dumps(stored))
    assert execute(study, run) == stored


def test_a_single_source_takes_the_steps_of_all_tasks(study):
    config = study.training(Run("single-b", 4, 1.0, 0))
    assert (config.algorithm, config.task_names, config.episodes * config.inner_steps) == ("mtl", ["b"], 24)


def test_holm_s_correction():
    assert report.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def records(tmp_path):
    """Main runs of four methods at two K: CTS at 60 + seed, the others a point or more below, the control at 0."""
    for lag, method in enumerate(report.COMPARED):
        for K in (100, 1000):
            for seed in range(3):
                values = [60.0 + seed - lag * (1 + 0.1 * seed) + math.log10(K)]
                run = {"method": method, "K": K, "beta": 0.1, "seed": seed, "kind": "main"}
                request = {"training": {"algorithm": method, "episodes": 6, "inner_steps": K}}
                accuracy = {"x": values, "y": values, report.CONTROL: [0.0]}
                record = {
                    "run": run,
                    "request": request,
                    "accuracy": accuracy,
                    "steps": [1, 2],
                    "loss": {"t": [2.0, 1.0]},
                }
                record["snapshots"] = {"1": accuracy}
                (tmp_path / f"{method}-{K}-{seed}.json").write_text(json.dumps(record))
    return report.read(tmp_path)


def test_contrasts_are_paired_and_leave_the_control_out(tmp_path):
    found = report.contrasts(records(tmp_path))
    assert list(found) == ["reptile", "no_shifting", "random_shifting"]
    assert found["no_shifting"]["mean"] == pytest.approx(2.2)
    assert found["no_shifting"]["p"] == pytest.approx(stats.ttest_1samp([2.0, 2.2, 2.4], 0).pvalue)
    assert found["no_shifting"]["p_holm"] >= found["no_shifting"]["p"]


def test_the_slope_is_in_points_per_decade(tmp_path):
    mean, half, seeds = report.slopes(records(tmp_path))["cts"]
    assert (mean, half, seeds) == (pytest.approx(1), pytest.approx(0, abs=1e-9), 3)


def test_updates_of_phi_are_counted():
    training = {"episodes": 6, "inner_steps": 1000}
    assert report.meta_updates({"request": {"training": training | {"algorithm": "reptile"}}}) == 6
    assert report.meta_updates({"request": {"training": training | {"algorithm": "cts"}}}) == 6000


def test_every_table_and_figure_is_made_of_partial_results(tmp_path):
    found = records(tmp_path)
    for table in report.TABLES.values():
        head, *rows = table(found)
        assert all(len(row) == len(head) for row in rows)
    for name in ("fig6", "fig7", "fig8"):
        getattr(long_horizon_figures, f"draw_{name}")(found, tmp_path / "out")
        assert (tmp_path / "out" / f"long_horizon_{name}.png").stat().st_size > 1000
    by_K = json.loads((tmp_path / "out" / "long_horizon_fig6.json").read_text())["control_by_K"]
    assert by_K["cts"] == {"100": 0, "1000": 0}
