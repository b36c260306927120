"""Meta-training and meta-test from a script: own modules, batches and datasets, with and without a folder."""

import json
import signal

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from dist_cts import (
    DATASETS,
    LOSSES,
    MODELS,
    Architecture,
    Loss,
    Stream,
    TrainConfig,
    meta_test_tasks,
    meta_train_tasks,
    train,
)
from dist_cts.errors import RunError
from dist_cts.run.exit_codes import DONE, STOPPED
from dist_cts.run.hooks import Hooks
from dist_cts.seeds import hashed_seed

K, LR = 5, 0.05
PLAIN = {"inner": {"lr": LR, "momentum": 0, "weight_decay": 0}, "inner_steps": K, "batch_size": 6, "log_every": K}


class Net(nn.Module):
    """A body of one matrix and a head; the outputs of the tasks differ in number."""

    def __init__(self, outputs):
        super().__init__()
        self.body, self.fc = nn.Linear(3, 4, bias=False), nn.Linear(4, outputs, bias=False)

    def forward(self, x):
        return self.fc(torch.tanh(self.body(x)))


def draw(generator, batch_size):
    x = torch.randn(batch_size, 3, generator=generator)
    return x, x.sum(1, keepdim=True).sin()


def draw_pair(generator, batch_size):
    x = torch.randn(batch_size, 3, generator=generator)
    return x, torch.stack((x[:, 0] > 0, x[:, 1] > x[:, 2]), 1)


def draw_class(generator, batch_size):
    x = torch.randn(batch_size, 3, generator=generator)
    return x, (x[:, 0] > 0).long()


def fixed(function, count=40):
    return [function(torch.Generator().manual_seed(9), count)]


@pytest.fixture(autouse=True)
def tables(tmp_path, monkeypatch):
    """The working folder is empty; the tables are restored."""
    monkeypatch.chdir(tmp_path)
    kept = [(table, dict(table)) for table in (DATASETS, MODELS)]
    yield
    for table, rows in kept:
        table.clear()
        table.update(rows)


def test_phi_is_that_of_algorithm_2_in_plain_pytorch(tmp_path):
    names, M, beta = ("one", "two"), 2, 0.3
    tasks = {name: Stream(draw, classes=1) for name in names}
    run = meta_train_tasks(tasks, Net, loss="mse", episodes=M, meta_lr=beta, seed=4, **PLAIN)

    def built(*seed):
        with torch.random.fork_rng():
            torch.manual_seed(hashed_seed(4, *seed))
            return Net(1)

    phi, models = built("phi").body.weight.detach().clone(), [built("head", name) for name in names]
    losses = []
    for step in range(M * K):
        for name, model in zip(names, models, strict=True):
            if step % K == 0:
                model.body.weight.data.copy_(phi)
            x, y = draw(torch.Generator().manual_seed(hashed_seed(4, name, step)), 6)
            loss = ((model(x) - y) ** 2).mean()
            for p, g in zip(model.parameters(), torch.autograd.grad(loss, [*model.parameters()]), strict=True):
                p.data -= LR * g
            losses.append(loss.item())
        delta = -beta * sum(phi - model.body.weight.data for model in models) / 2
        phi += delta
        for model in models:
            model.body.weight.data += delta
    assert run.code == DONE
    torch.testing.assert_close(run.phi["body.weight"], phi, rtol=1e-5, atol=1e-6)
    assert [record["task"] for record in run.history] == [*names] * M
    assert run.history[0]["loss"] == pytest.approx(sum(losses[: 2 * K : 2]) / K, abs=2e-6)
    assert run.history[0]["rmse"] == pytest.approx(run.history[0]["loss"] ** 0.5, abs=2e-6)
    assert not any(tmp_path.iterdir())


def test_a_call_with_a_folder_resumes_bit_identically(tmp_path):
    settings = {"meta_lr": 0.3, "loss": "bce", "eval_every": K, **PLAIN}
    tasks = {name: Stream(draw_pair, test=fixed(draw_pair), classes=2) for name in ("one", "two")}
    whole = meta_train_tasks(tasks, Net, episodes=3, run_dir=tmp_path / "whole", **settings)
    meta_train_tasks(tasks, Net, episodes=1, run_dir=tmp_path / "parts", **settings)
    parts = meta_train_tasks(tasks, Net, episodes=3, run_dir=tmp_path / "parts", **settings)
    assert torch.equal(whole.phi["body.weight"], parts.phi["body.weight"])
    unmeasured = ("steps_per_second", "wait_seconds")
    first, second = (
        [{key: value for key, value in record.items() if key not in unmeasured} for record in run.history]
        for run in (whole, parts)
    )
    assert first == second
    assert any("test_mAP" in record for record in first)
    assert not any("mAP" in record for record in first)  # a training batch has none


def test_tasks_of_three_kinds_have_losses_of_their_own(tmp_path, monkeypatch):
    for name, function, classes in (("regress", draw, 1), ("several", draw_pair, 2), ("classify", draw_class, 2)):
        monkeypatch.setitem(DATASETS, name, Stream(function, test=fixed(function), classes=classes))
    monkeypatch.setitem(MODELS, "net", Architecture(Net, "fc"))
    tasks = [{"name": "regress", "loss": "mse"}, {"name": "several", "loss": {"name": "bce"}}, "classify"]
    loss = {"name": "cross_entropy", "label_smoothing": 0.1}
    config = TrainConfig(
        tasks=tasks, model={"name": "net"}, loss=loss, meta_lr=0.3, episodes=1, eval_every=K, run_dir=tmp_path, **PLAIN
    )
    assert train(config) == DONE
    keys = {}
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        keys.setdefault(record["task"], set()).update(record)
    metrics = {"rmse", "mAP", "accuracy"}
    for task, metric in (("regress", "rmse"), ("several", "mAP"), ("classify", "accuracy")):
        assert f"test_{metric}" in keys[task]
        assert keys[task] & metrics == {metric} - {"mAP"}


def test_a_map_style_dataset_and_labels_are_meta_tested_without_a_folder(tmp_path):
    def open_split(split):
        x, y = draw_class(torch.Generator().manual_seed(len(split)), 60)
        dataset = TensorDataset(x, y)
        dataset.classes = 2
        return dataset

    run = meta_train_tasks({"set": open_split}, Net, episodes=2, meta_lr=0.3, **PLAIN)
    start = {"phi": run.phi}
    tested = meta_test_tasks({"new": open_split}, start, Net, steps=20, seeds=2, batch_size=6, eval_points=2)
    again = meta_test_tasks({"new": open_split}, start, Net, steps=20, seeds=2, batch_size=6, eval_points=2)
    assert tested.results == again.results
    assert [(r["start"], r["seed"]) for r in tested.results] == [
        *[("random", 0), ("random", 1), ("phi", 0), ("phi", 1)]
    ]
    assert set(tested.summary) == {"random", "phi"}
    cell = tested.summary["phi"]["new"]
    assert cell["seeds"] == [100 * r["curve"][-1]["accuracy"] for r in tested.results[2:]]
    assert str(tested).startswith("| initialization | new | average |")
    assert not any(tmp_path.iterdir())
    for phi, jobs in ((run.phi, 2), (run.phi, 2), ({name: tensor + 1 for name, tensor in run.phi.items()}, 4)):
        kept = {"random": False, "out": tmp_path / "kept", "steps": 20, "seeds": 2, "batch_size": 6, "eval_points": 2}
        results = meta_test_tasks({"new": open_split}, {"phi": phi}, Net, **kept).results
        assert (results == tested.results[2:]) == (phi is run.phi)
        assert len(list((tmp_path / "kept/jobs").iterdir())) == jobs


def test_ctrl_c_returns_what_there_is_and_an_error_leaves_the_process_usable(monkeypatch):
    tasks = {"one": Stream(draw, classes=1)}
    with pytest.raises(ValueError, match="loss='msee': unknown; did you mean mse"):
        meta_train_tasks(tasks, Net, loss="msee", episodes=1, **PLAIN)
    with pytest.raises(ValueError, match=r"loss=mse needs outputs and targets of one shape, found \[6, 2\] and"):
        meta_train_tasks({"one": Stream(draw, classes=2)}, Net, loss="mse", episodes=1, **PLAIN)
    with pytest.raises(ValueError, match="task set: expected a Stream, or a function of the split"):
        meta_train_tasks({"set": TensorDataset(torch.zeros(3))}, Net, episodes=1, **PLAIN)
    with pytest.raises(ValueError, match="task one: it has no test batches"):
        meta_train_tasks(tasks, Net, loss="mse", episodes=1, eval_every=1, **PLAIN)
    with pytest.raises(ValueError, match="snapshot_every=1: set run_dir too"):
        meta_train_tasks(tasks, Net, loss="mse", episodes=1, snapshot_every=1, **PLAIN)
    with pytest.raises(RunError, match="the update of task one is not finite"):
        meta_train_tasks(tasks, Net, loss="mse", episodes=9, **PLAIN | {"inner": {"lr": 1e30}})
    after_step = Hooks.__call__

    def interrupted(self):
        if self.state.progress.step == 3:
            signal.raise_signal(signal.SIGINT)
        after_step(self)

    monkeypatch.setattr(Hooks, "__call__", interrupted)
    run = meta_train_tasks(tasks, Net, loss="mse", episodes=9, **PLAIN)
    assert run.code == STOPPED
    assert run.phi["body.weight"].isfinite().all()
    assert run.history[-1]["step"] < 9 * K


def test_a_loss_without_a_metric_is_what_a_meta_test_compares(monkeypatch):
    monkeypatch.setitem(LOSSES, "huber", Loss(nn.functional.huber_loss))
    stream = {"one": Stream(draw, test=fixed(draw), classes=1)}
    run = meta_train_tasks(stream, Net, loss={"name": "huber", "delta": 0.5}, episodes=1, meta_lr=0.3, **PLAIN)
    assert {"loss"} == run.history[-1].keys() & {"loss", "accuracy", "rmse"}
    tested = meta_test_tasks(stream, {}, Net, loss="huber", steps=4, seeds=1, eval_points=2)
    cell = tested.summary["random"]["one"]
    assert cell["best"] <= cell["loss"] == tested.results[0]["curve"][-1]["loss"]
