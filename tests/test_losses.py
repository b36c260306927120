"""Losses and metrics against their definitions, and how configurations name them."""

import math

import pytest
import torch
from torch import nn

from dist_cts.config import load
from dist_cts.learner import InnerConfig, TaskLearner
from dist_cts.losses import ACCURACY, LOSSES, MAE, MAP, RMSE, Loss, LossConfig, Metric, make_loss
from dist_cts.run.config import TrainConfig
from dist_cts.run.report import markdown, summarize
from tests.helpers.batches import MemoryBatches


def make(loss):
    torch.manual_seed(0)
    return TaskLearner("a", nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 4)), "1", None, InnerConfig(), criterion=loss)


def mean_average_precision(scores, labels):
    """The mean over classes of the precision at each positive, by sorting; ties do not occur."""
    values = []
    for score, label in zip(scores.T, labels.T, strict=True):
        hits = label[score.argsort(descending=True)].double()
        if hits.sum():
            values.append(float((hits.cumsum(0) / torch.arange(1, len(hits) + 1) * hits).sum() / hits.sum()))
    return sum(values) / len(values)


def test_losses_are_means_over_the_examples():
    x, y = torch.randn(6, 4), torch.randn(6, 4)
    labels, classes = (y > 0).long(), torch.arange(6) % 4
    p = x.softmax(1)
    right = -p[range(6), classes].log()
    assert LOSSES["cross_entropy"].function(x, classes).item() == pytest.approx(right.mean().item(), rel=1e-5)
    smooth = make_loss(LossConfig(name="cross_entropy", label_smoothing=0.2)).function(x, classes)
    assert smooth.item() == pytest.approx((0.8 * right - 0.2 * p.log().mean(1)).mean().item(), rel=1e-5)
    one_hot = nn.functional.one_hot(classes, 4).float()
    assert LOSSES["cross_entropy"].function(x, one_hot).item() == pytest.approx(right.mean().item(), rel=1e-5)
    pixels, of_pixels = torch.randn(2, 4, 3, 5), torch.randint(4, (2, 3, 5))
    for options in ({}, {"label_smoothing": 0.2}):
        loss = make_loss(LossConfig(name="cross_entropy", **options)).function(pixels, of_pixels).item()
        assert loss == pytest.approx(nn.functional.cross_entropy(pixels, of_pixels, **options).item(), rel=1e-5)
    binary = -(labels * x.sigmoid().log() + (1 - labels) * (1 - x.sigmoid()).log())
    assert LOSSES["bce"].function(x, labels).item() == pytest.approx(binary.mean().item(), rel=1e-5)
    assert LOSSES["mse"].function(x, y).item() == pytest.approx(((x - y) ** 2).mean().item(), rel=1e-5)
    assert LOSSES["l1"].function(x, y).item() == pytest.approx((x - y).abs().mean().item(), rel=1e-5)


@pytest.mark.parametrize("name", ["bce", "mse", "l1"])
def test_outputs_and_targets_of_different_shapes_are_an_error(name):
    with pytest.raises(ValueError, match=rf"loss={name} needs outputs and targets of one shape, found \[6, 1\] and"):
        LOSSES[name].function(torch.zeros(6, 1), torch.zeros(6))


def test_an_evaluation_counts_every_example_once_whatever_the_batches():
    x, y = torch.randn(23, 5), torch.randn(23, 4)
    batches = [(x[:10], y[:10]), (x[10:20], y[10:20]), (x[20:], y[20:])]
    learner = make(LOSSES["mse"])
    outputs = learner.model(x).detach()
    square = ((outputs - y) ** 2).mean().item()
    assert learner.evaluate(batches) == pytest.approx({"loss": square, "rmse": math.sqrt(square)}, rel=1e-5)
    absolute = (outputs - y).abs().mean().item()
    assert make(LOSSES["l1"]).evaluate(batches) == pytest.approx({"loss": absolute, "mae": absolute}, rel=1e-5)
    several = [(inputs, (targets > 0.5).int()) for inputs, targets in batches]
    values = make(LOSSES["bce"]).evaluate(several)
    assert values["mAP"] == pytest.approx(mean_average_precision(outputs, y > 0.5))
    assert values["loss"] == pytest.approx(LOSSES["bce"].function(outputs, y > 0.5).item(), rel=1e-5)


def test_classes_without_positives_do_not_count_and_no_class_is_nan():
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]])
    assert MAP.function(scores, torch.tensor([[1, 0], [0, 0], [1, 0]])).item() == pytest.approx((1 + 2 / 3) / 2)
    assert MAP.function(scores, torch.zeros(3, 2)).isnan()
    assert all(map(math.isnan, make(LOSSES["mse"]).evaluate([]).values()))


def test_a_training_batch_has_the_metric_unless_it_is_pooled_or_absent():
    for name, counted in (("mse", True), ("bce", False), ("none", False)):
        learner = make(LOSSES[name] if name in LOSSES else Loss(nn.functional.mse_loss))
        learner.batches = MemoryBatches(0)
        learner.step_on((torch.randn(7, 5), torch.ones(7, 4)))
        _, loss, metric, _ = learner.take_counters().tolist()
        assert metric == (pytest.approx(loss) if counted else 0)


def test_a_loss_per_example_is_an_error_and_a_metric_may_be_a_number():
    batch = torch.randn(7, 5), torch.ones(7, 4)
    with pytest.raises(ValueError, match=r"task a: its loss has shape \[7, 4\]; return the mean over the examples"):
        make(Loss(lambda outputs, targets: (outputs - targets).abs())).compute_loss(batch)
    learner = make(Loss(nn.functional.l1_loss, Metric("count", lambda outputs, targets: 7)))
    learner.step_on(batch)
    assert learner.take_counters()[2] == learner.evaluate([batch])["count"] == 7


def test_the_loss_is_never_computed_in_half_precision():
    learner = make(LOSSES["mse"])
    learner.autocast = torch.bfloat16
    loss, metric = learner.compute_loss((torch.randn(7, 5), torch.ones(7, 4)))
    assert loss.dtype == metric.dtype == torch.float32
    learner = make(Loss(lambda outputs, targets: (outputs["x"] - targets).square().mean()))
    learner.autocast, model = torch.bfloat16, learner.model
    learner.model = lambda inputs: {"x": model(inputs), "length": torch.tensor(3)}
    assert learner.compute_loss((torch.randn(7, 5), torch.ones(7, 4)))[0].dtype == torch.float32


def test_a_config_names_a_loss_for_all_tasks_and_for_one(tmp_path):
    (tmp_path / "x.yaml").write_text(
        "tasks: [a, {name: b, loss: mse}]\nloss: {name: cross_entropy, label_smoothing: 0.1}"
    )
    config = load(TrainConfig, tmp_path / "x.yaml", [])
    assert config.loss_of(config.tasks[0]) == LossConfig(name="cross_entropy", label_smoothing=0.1)
    assert make_loss(config.loss_of(config.tasks[1])) is LOSSES["mse"]
    assert TrainConfig.model_validate(config.model_dump(mode="json")) == config
    assert load(TrainConfig, None, ["tasks=[a]", "loss.label_smoothing=0.2"]).loss.label_smoothing == 0.2
    assert make_loss(LossConfig()).metric is ACCURACY
    named = load(TrainConfig, None, ["tasks=[a]", "loss=mine", "loss.gamma=2"]).loss
    assert (named.name, named.gamma) == ("mine", 2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "cross_entrpy"}, "loss='cross_entrpy': unknown; did you mean cross_entropy"),
        ({"name": "os.system"}, "loss='os.system': unknown; choose one of cross_entropy, bce, mse, l1; --import"),
        ({"name": "mse", "delta": 1}, "loss.delta=1: unknown; choose one of none"),
        ({"label_smothing": 0.1}, "loss.label_smothing=0.1: unknown; did you mean label_smoothing"),
        ({"label_smoothing": 1.5}, r"loss.label_smoothing=1.5: expected a number below 1"),
        ({"label_smoothing": "much"}, r"loss.label_smoothing='much': expected a number"),
    ],
)
def test_an_unknown_loss_or_option_names_the_nearest_ones(given, message):
    with pytest.raises(ValueError, match=message):
        make_loss(LossConfig(**given))


def test_a_row_of_ones_own_takes_options_from_its_signature(monkeypatch):
    monkeypatch.setitem(LOSSES, "huber", Loss(nn.functional.huber_loss, MAE))
    loss = make_loss(LossConfig(name="huber", delta=0.5))
    assert loss.function(torch.zeros(1), torch.full((1,), 2.0)).item() == 0.5 * (2 - 0.25)
    assert loss.metric is MAE
    with pytest.raises(ValueError, match="a metric cannot be called 'step'"):
        Metric("step", nn.functional.l1_loss)


def test_a_report_knows_which_value_is_best_and_leaves_out_nan():
    def job(start, seed, *values):
        return {"start": start, "target": "x", "seed": seed, "curve": [{"loss": 0, "rmse": value} for value in values]}

    results = [job("a", 0, 0.5, 1.0), job("a", 1, math.nan, 3.0), job("b", 0, 1.0, 4.0), job("b", 1, 2.0, 4.0)]
    summary = summarize([*results, job("c", 0, math.nan, math.nan)], ["x"], RMSE)
    assert (summary["a"]["x"]["rmse"], summary["a"]["x"]["best"]) == (2.0, (0.5 + 3) / 2)
    assert math.isnan(summary["c"]["x"]["best"])
    table = markdown(summary, ["x"], metric=RMSE)
    assert "| a | **2 ±" in table
    assert "| b | 4 ± 0 |" in table
    assert "| c | nan | nan |" in table
