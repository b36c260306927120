"""The meta-test's statistics, subsets and table; tests/test_launch.py runs the command."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from torch import nn

from dist_cts import models
from dist_cts.data import beton
from dist_cts.data.batches import DataConfig
from dist_cts.data.plan import SamplePlan
from dist_cts.data.source import ResidentSource
from dist_cts.data.tasks import open_split
from dist_cts.learner import TaskLearner
from dist_cts.losses import LOSSES, RMSE, Loss
from dist_cts.run import meta_test as meta_test_module
from dist_cts.run.meta_test import Job, MetaTestConfig, adapt, balanced_subset
from dist_cts.run.report import draw_bars, interval, markdown, write_report
from dist_cts.seeds import hashed_seed


def test_the_interval_is_student_s():
    # Three values 1 apart: standard error 1 / sqrt(3), and t(0.975, 2 degrees of freedom) = 4.302653.
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.302653 / 3**0.5))
    mean, half = interval([5.0])
    assert mean == 5.0
    assert np.isnan(half)


def test_a_subset_is_balanced_seeded_and_without_repeats():
    labels = np.repeat(np.arange(7), 50)
    subset = balanced_subset(labels, 100, "seed")
    assert len(set(subset)) == 100
    counts = np.bincount(labels[subset], minlength=7)
    assert counts.min() >= 14
    assert counts.max() <= 15
    assert np.array_equal(subset, balanced_subset(labels, 100, "seed"))
    assert not np.array_equal(subset, balanced_subset(labels, 100, "other"))
    with pytest.raises(ValueError, match="train_limit=351: the target has only 350 training images"):
        balanced_subset(labels, 351, "seed")


def test_the_table_marks_the_best_of_every_column():
    def cell(mean, half=0.5):
        return {"accuracy": mean, "ci95": half}

    table = markdown(
        {"random": {"x": cell(10.0), "y": cell(30.0)}, "cts": {"x": cell(20.0), "y": cell(28.0)}}, ["x", "y"]
    )
    assert table.splitlines() == [
        "| initialization | x | y | average |",
        "|---|---|---|---|",
        "| random | 10.00 ± 0.50 | **30.00 ± 0.50** | 20.00 |",
        "| cts | **20.00 ± 0.50** | 28.00 ± 0.50 | **24.00** |",
    ]


@pytest.mark.parametrize(
    ("schedule", "share"),
    [
        ("multi-step", lambda step: 0.3 ** ((step >= 8) + (step >= 14) + (step >= 18))),  # 40, 70 and 90 % of 20 steps
        ("cosine", lambda step: (1 + math.cos(math.pi * step / 20)) / 2),
        ("constant", lambda step: 1.0),
    ],
)
def test_every_step_is_taken_at_the_rate_of_its_schedule(monkeypatch, tasks, schedule, share):
    config = MetaTestConfig(
        targets=["a"], steps=20, schedule=schedule, schedule_factor=0.3, batch_size=8, inner={"lr": 0.1},
        model={"name": "tiny"}, data={"root": tasks}, eval_points=2,
    )  # fmt: skip
    rates, inner_step = [], TaskLearner.inner_step
    monkeypatch.setattr(
        TaskLearner, "inner_step", lambda self: (rates.append(self.optimizer.param_groups[0]["lr"]), inner_step(self))
    )
    (curve,) = adapt(config, [Job("a", "random", None, seed=0)], torch.device("cpu"))
    assert [point["step"] for point in curve] == [10, 20]
    assert rates == pytest.approx([0.1 * share(step) for step in range(20)])


@pytest.mark.parametrize("channels_last", [False, True])
def test_images_and_weights_have_the_configured_memory_format(monkeypatch, tasks, channels_last):
    config = MetaTestConfig(
        targets=["a"], steps=1, eval_points=1, batch_size=8, model={"name": "tiny"}, data={"root": tasks},
        channels_last=channels_last,
    )  # fmt: skip
    seen, inner_step = [], TaskLearner.inner_step

    def watched(learner):
        inner_step(learner)
        seen.extend([learner.batch[0], learner.model.conv2.weight])

    monkeypatch.setattr(TaskLearner, "inner_step", watched)
    adapt(config, [Job("a", "random", None, seed=0)], torch.device("cpu"))
    assert [t.is_contiguous(memory_format=torch.channels_last) for t in seen] == [channels_last] * 2


def test_last_and_best_are_reported_and_whiskers_stay_within_percentages(tmp_path, capsys):
    config = MetaTestConfig(targets=["x"], steps=20, seeds=2, eval_points=2, out=tmp_path)
    results = [
        {"target": "x", "start": "random", "seed": seed, "curve": [{"accuracy": best}, {"accuracy": last}]}
        for seed, best, last in ((0, 0.5, 0.01), (1, 0.7, 0.21))
    ]
    write_report(tmp_path, config.model_dump(mode="json"), {}, results, config.metrics())
    last, best = (tmp_path / "meta_test.md").read_text().split("The best of the 2 evaluations")
    assert "| random | **11.00 ± 127.06** | **11.00** |" in last
    assert "| random | **60.00 ± 127.06** | **60.00** |" in best
    assert best.strip() in capsys.readouterr().out
    figure, axes = pyplot.subplots()
    draw_bars(axes, json.loads((tmp_path / "meta_test.json").read_text())["summary"])
    ((low, high),) = (path[:, 1] for path in axes.collections[0].get_segments())
    assert (low, high) == pytest.approx((0, 100))
    pyplot.close(figure)


PROBED = MetaTestConfig(
    targets=["a"], steps=30, batch_size=8, inner={"lr": 0.1}, model={"name": "tiny"}, eval_points=2, train_limit=20
)


@torch.no_grad()
def features_of(config, job, tasks):
    """The frozen features of both splits, by hand: statistics, then the input of the head."""
    key = hashed_seed(job.seed, "meta-test")
    splits = [open_split("a", split, DataConfig(root=tasks), torch.device("cpu")) for split in ("train", "test")]
    model, _ = models.build(config.model, 3, key, "a")
    chosen = balanced_subset(splits[0].labels, 20, key)
    batches = splits[0].batches(key, 8, indices=chosen)
    seen = [batches.next()[0] for _ in range(3)]  # 20 images in batches of 8
    x = seen
    for convolution, norm in ((model.conv1, model.bn1), (model.conv2, model.bn2)):
        x = [convolution(batch) for batch in x]
        norm.running_mean.copy_(torch.stack([batch.mean((0, 2, 3)) for batch in x]).mean(0))
        norm.running_var.copy_(torch.stack([batch.transpose(0, 1).flatten(1).var(1) for batch in x]).mean(0))
        x = [torch.relu(nn.functional.batch_norm(batch, None, None, norm.weight, norm.bias, True)) for batch in x]
    model.eval(), setattr(model, "fc", nn.Identity())
    features = []
    for split, indices in zip(splits, (chosen, None), strict=True):
        images, labels = zip(*split.test_batches(64, indices), strict=True)
        features.append((model(torch.cat(images)), torch.cat(labels)))
    return features


def test_nearest_neighbors_vote(tasks):
    config, job = PROBED.model_copy(update={"protocol": "knn", "data": DataConfig(root=tasks)}), Job("a", "r", None, 1)
    ((point,),) = adapt(config, [job], torch.device("cpu"))
    (known, labels), (inputs, targets) = features_of(config, job, tasks)
    correct = 0
    for x, target in zip(inputs, targets, strict=True):
        similarity = [float(x @ other / x.norm() / other.norm()) for other in known]
        votes = [sum(math.exp(s / 0.07) for s, y in zip(similarity, labels, strict=True) if y == c) for c in range(3)]
        correct += int(votes.index(max(votes)) == target)  # all 20 training images are neighbors
    assert point["accuracy"] == pytest.approx(correct / len(targets), abs=0.02)
    assert point["accuracy"] > 0.5


def test_a_linear_probe_trains_the_head_alone(tasks):
    config = PROBED.model_copy(update={"protocol": "linear-probe", "data": DataConfig(root=tasks)})
    job = Job("a", "r", None, 1)
    (curve,) = adapt(config, [job], torch.device("cpu"))
    assert [point["step"] for point in curve] == [15, 30]
    (known, labels), (inputs, targets) = features_of(config, job, tasks)
    head, key = models.build(config.model, 3, hashed_seed(1, "meta-test"), "a")[0].fc, hashed_seed(1, "meta-test")
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    for step, index in enumerate(SamplePlan(key, "a", 20, 8, 0, False).chunk(0, 30).index):
        optimizer.param_groups[0]["lr"] = 0.1 * 0.2 ** ((step >= 12) + (step >= 21) + (step >= 27))
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(known[index]), labels[index]).backward()
        optimizer.step()
    assert curve[-1]["loss"] == pytest.approx(nn.functional.cross_entropy(head(inputs), targets).item(), abs=1e-4)


def test_every_target_is_verified_once_and_its_splits_are_loaded_once_for_all_its_jobs(tasks, tmp_path, monkeypatch):
    verified, loaded = [], []
    verify, opener = beton.verify, meta_test_module.open_split
    monkeypatch.setattr(beton, "verify", lambda path, **how: verified.append(how["checksum"]) or verify(path, **how))
    monkeypatch.setattr(meta_test_module, "open_split", lambda *a, **k: loaded.append(a) or opener(*a, **k))
    config = MetaTestConfig(
        targets=["a", "b"], seeds=3, steps=1, eval_points=1, batch_size=8, model={"name": "tiny"}, data={"root": tasks},
        out=tmp_path, device="cpu",
    )  # fmt: skip
    assert meta_test_module.meta_test(config) == 0
    assert sum(verified) == 4
    assert len(loaded) == 8  # two splits of two targets, before the first job and for all jobs of a target


def test_every_split_is_verified_and_loaded_once_for_all_jobs_of_a_target(tasks, tmp_path, monkeypatch):
    loaded, verified = [], []
    load, verify = ResidentSource.__init__, beton.verify

    def counted(path, checksum=True):
        verified.extend([path] if checksum else [])
        return verify(path, checksum=checksum)

    monkeypatch.setattr(
        ResidentSource, "__init__", lambda self, path, *rest: loaded.append(path) or load(self, path, *rest)
    )
    monkeypatch.setattr(beton, "verify", counted)
    config = MetaTestConfig(
        targets=["a", "b"], seeds=3, steps=1, batch_size=4, eval_points=1, model={"name": "tiny"}, device="cpu",
        data={"root": tasks}, out=tmp_path,
    )  # fmt: skip
    assert len(meta_test_module.run_jobs(config, {})) == 6
    expected = sorted(tasks / task / f"{split}.beton" for task in "ab" for split in ("train", "test"))
    assert sorted(loaded) == sorted(verified) == expected


def one_hot(logits, labels):
    return nn.functional.mse_loss(logits, nn.functional.one_hot(labels, logits.shape[1]).float())


def test_a_target_has_its_own_loss_and_metric(tasks, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(LOSSES, "one_hot", Loss(one_hot, replace(RMSE, function=one_hot)))
    values = {
        "steps": 2, "eval_points": 2, "seeds": 2, "batch_size": 8, "model": {"name": "tiny"}, "device": "cpu",
        "data": {"root": tasks},
    }  # fmt: skip
    smooth = {"name": "cross_entropy", "label_smoothing": 0.5}
    targets = ["a", {"name": "b", "loss": smooth}, {"name": "c", "loss": "one_hot"}]
    mixed = MetaTestConfig(targets=targets, out=tmp_path, **values)
    assert mixed.model_dump(mode="json")["targets"][:2] == ["a", targets[1]]
    assert MetaTestConfig.model_validate(mixed.model_dump(mode="json")) == mixed
    results = meta_test_module.run_jobs(mixed, {})
    for target, loss in (("a", "cross_entropy"), ("b", smooth), ("c", "one_hot")):
        alone = meta_test_module.run_jobs(MetaTestConfig(targets=[target], loss=loss, out=tmp_path, **values), {})
        assert [result for result in results if result["target"] == target] == alone
    assert len([*(tmp_path / "jobs").iterdir()]) == 6  # those alone were found
    assert meta_test_module.meta_test(mixed) == 0
    shown = capsys.readouterr().out
    assert "Test accuracy in % after 2 steps" in shown
    assert "| initialization | a | b | average |" in shown
    assert "Test rmse after 2 steps" in shown
    assert "| initialization | c | average |" in shown
    assert {*json.loads((tmp_path / "meta_test.json").read_text())["summary"]["random"]} == {"a", "b", "c"}
