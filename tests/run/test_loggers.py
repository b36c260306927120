"""Loggers: what they receive, what their failures cost, and the pictures of runs."""

import importlib.util
import json
import sqlite3
import sys
import time
from types import SimpleNamespace

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from dist_cts.run import loggers
from dist_cts.run import train as training
from dist_cts.run.config import TrainConfig
from dist_cts.run.curves import draw_curves
from dist_cts.run.exit_codes import DONE
from dist_cts.run.loggers import LOGGERS, LoggedRun, Loggers, check_loggers
from tests.helpers.commands import records


@pytest.fixture
def config(tasks, tmp_path):
    return TrainConfig(
        tasks=["a", "b"], episodes=2, inner_steps=2, meta_lr=0.5, batch_size=8, run_dir=tmp_path / "run", device="cpu",
        log_every=1, eval_every=2, model={"name": "tiny"}, data={"root": tasks}, checkpoint={"every_steps": 0},
        loggers=["mine"], project="mine",
    )  # fmt: skip


class Recorder:
    """A logger that keeps what it receives."""

    def __init__(self, run):
        self.run, self.received, self.closed = run, [], False
        Recorder.last = self

    def log(self, scalars, step):
        self.received += [(step, tag, value) for tag, value in scalars.items()]

    def close(self):
        self.closed = True


def test_a_logger_receives_what_metrics_jsonl_holds_and_the_means(config, monkeypatch):
    monkeypatch.setitem(LOGGERS, "mine", Recorder)
    assert training.train(config) == DONE
    found = Recorder.last
    assert (found.run.project, found.run.step, found.run.config["episodes"], found.closed) == ("mine", 0, 2, True)
    expected = set()
    for record in records(config.run_dir):
        keys = record.keys() & {"loss", "accuracy", "test_loss", "test_accuracy", "wait_seconds"}
        expected |= {(record["step"], f"{key}/{record['task']}", record[key]) for key in keys}
    means = {(step, tag) for step, tag, _ in found.received if "/" not in tag or tag.startswith("mean/")}
    assert means == {(step, tag) for step in (1, 2, 3, 4) for tag in ("mean/loss", "mean/accuracy", "steps_per_second")}
    assert {entry for entry in found.received if entry[:2] not in means} == expected
    assert len(expected) == 4 * 2 * 3 + 2 * 2 * 2


@pytest.mark.parametrize("fault", ["__init__", "log", "close"])
def test_a_logger_that_fails_is_reported_once_and_the_run_ends_well(config, monkeypatch, capfd, fault):
    def fail(*_):
        raise KeyError("no network")

    monkeypatch.setitem(LOGGERS, "mine", type("Broken", (Recorder,), {fault: fail}))
    assert training.train(config) == DONE
    err = capfd.readouterr().err
    assert err.count("warning: logger mine: records lost: 'no network'; training continues") == 1
    assert len(records(config.run_dir)) == 4 * 2 + 2 * 2


def test_a_logger_that_hangs_at_the_end_is_left_behind(config, monkeypatch, capfd):
    monkeypatch.setattr(loggers, "CLOSING_SECONDS", 0.2)
    monkeypatch.setitem(LOGGERS, "mine", type("Stuck", (Recorder,), {"close": lambda self: time.sleep(20)}))
    assert training.train(config) == DONE
    assert "logger mine: records lost: not finished after 0 s" in capfd.readouterr().err


def test_the_error_of_a_failed_run_stays_the_last_line(tmp_path, monkeypatch):
    def fail(*_):
        raise KeyError("no network")

    lines = []
    monkeypatch.setattr(loggers, "log_rank0", lines.append)
    monkeypatch.setitem(LOGGERS, "mine", type("Broken", (Recorder,), {"close": fail}))
    for failed in (True, False):
        Loggers(["mine"], LoggedRun(tmp_path, "mine", {})).close(failed)
        assert len(lines) == (not failed)


def test_unknown_loggers_and_missing_packages_are_one_line(monkeypatch):
    with pytest.raises(ValueError, match=r"loggers='tensorbord': unknown; did you mean tensorboard\?"):
        check_loggers(["tensorbord"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"wandb is not installed; pip install 'dist_cts\[wandb\]', or leave it out"):
        check_loggers(["tensorboard", "wandb"])


class Service:
    """The part of wandb and trackio that we use."""

    Settings = SimpleNamespace

    def __init__(self):
        self.started, self.entries = [], []

    def init(self, **options):
        self.started.append(options)
        return self

    def define_metric(self, *names, **options):
        self.metric = names, options

    def log(self, values, step=None):
        self.entries.append((values, step))

    def finish(self):
        self.entries.append("finished")


@pytest.mark.parametrize(
    ("name", "entry"), [("wandb", ({"step": 7, "loss/a": 2.0}, None)), ("trackio", ({"loss/a": 2.0}, 7))]
)
def test_a_service_sees_one_run_over_resumes_and_another_after_fresh(tmp_path, monkeypatch, name, entry):
    service = Service()
    monkeypatch.setitem(sys.modules, name, service)
    for folder in ("run", "run", "other"):
        (tmp_path / folder).mkdir(exist_ok=True)
        logger = Loggers([name], LoggedRun(tmp_path / folder, "project", {"meta_lr": 0.5}, 5))
        logger.log({"loss/a": 2.0}, 7)
        logger.close()
    assert service.entries == [entry, "finished"] * 3
    one, again, other = ((start["name"], start.get("id")) for start in service.started)
    assert one == again != other
    assert {(start["project"], start["resume"]) for start in service.started} == {("project", "allow")}
    if name == "wandb":  # its own step must not decrease
        assert service.metric == (("*",), {"step_metric": "step"})


def test_wandb_offline(config, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed: pip install 'dist_cts[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert training.train(config.model_copy(update={"loggers": ["wandb"]})) == DONE
    (log,) = (config.run_dir / "wandb").glob(f"offline-run-*-{(config.run_dir / 'logger_id').read_text()}/run-*.wandb")
    assert b"test_accuracy/b" in log.read_bytes()


def test_trackio_offline(config, monkeypatch, tmp_path):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason="trackio is not installed: pip install 'dist_cts[trackio]'")
    assert training.train(config.model_copy(update={"loggers": ["trackio"]})) == DONE
    (database,) = (tmp_path / "trackio").rglob("mine.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select run_name, step, metrics from metrics").fetchall()
    assert {name for name, *_ in rows} == {f"run-{(config.run_dir / 'logger_id').read_text()}"}
    assert {step for _, step, values in rows if "test_accuracy/b" in str(values)} == {2, 4}


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved."""
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    return figures


def write_run(folder, tasks, steps=(2, 4, 6)):
    folder.mkdir()
    lines = []
    for step in steps:
        for number in range(tasks):
            where = {"step": step, "cumulative_inner_steps": step * tasks, "task": f"task {number}"}
            lines.append(where | {"loss": number + 1 / step, "accuracy": 0.5, "steps_per_second": 10.0})
            lines.append(where | {"test_loss": number + 2 / step, "test_accuracy": 0.4})
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def test_the_picture_of_one_run_has_a_line_per_task(tmp_path, drawn):
    draw_curves([write_run(tmp_path / "run", 3)], tmp_path / "curves.png")
    loss, accuracy, speed = drawn[0].axes
    assert [axes.get_ylabel() for axes in (loss, accuracy, speed)] == ["loss", "accuracy", "steps per second"]
    solid = {line.get_label(): line for line in loss.lines if line.get_linestyle() == "-"}
    assert list(solid) == ["task 0", "task 1", "task 2"]
    assert list(solid["task 2"].get_ydata()) == [2.5, 2.25, pytest.approx(2 + 1 / 6)]
    assert sum(line.get_linestyle() == "--" for line in accuracy.lines) == 3
    assert [list(line.get_ydata()) for line in speed.lines if len(line.get_ydata())] == [[10, 10, 10]]
    assert imread(tmp_path / "curves.png").std() > 0.01


def test_of_many_tasks_the_mean_stands_out(tmp_path, drawn):
    draw_curves([write_run(tmp_path / "run", 40)], tmp_path / "curves.png")
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["mean of 40 tasks"]
    assert len(drawn[0].axes[0].lines) == 2 * 41


def test_several_runs_are_means_over_their_tasks(tmp_path, drawn):
    runs = [write_run(tmp_path / "cts", 3), write_run(tmp_path / "reptile", 2, steps=(3,))]
    draw_curves(runs, tmp_path / "curves.png")
    lines = {line.get_label(): line for line in drawn[0].axes[0].lines}
    assert list(lines["cts"].get_ydata()) == [1.5, 1.25, pytest.approx(1 + 1 / 6)]
    assert list(lines["reptile"].get_xdata()) == [3]
    assert [lines[name].get_marker() for name in ("cts", "reptile")] == ["None", "."]  # one point makes no line
    assert drawn[0].axes[0].get_ylabel() == "loss, mean over tasks"


def test_a_run_that_ends_or_stops_leaves_its_picture(config):
    assert training.train(config.model_copy(update={"loggers": ["curves"]})) == DONE
    assert imread(config.run_dir / "curves.png").std() > 0.01
