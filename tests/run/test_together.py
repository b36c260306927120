"""Adaptations together: every learner takes the steps that it takes alone."""

import pytest
import torch
from torch import nn

from dist_cts.data.batches import DataConfig
from dist_cts.data.tasks import open_split
from dist_cts.models.table import MODELS, Architecture
from dist_cts.models.tiny import Tiny
from dist_cts.optimizer import make_schedule
from dist_cts.run.meta_test import MetaTestConfig, meta_test, open_learner, run_jobs
from dist_cts.run.together import Together

CPU = torch.device("cpu")


def few_shot(tasks, **values):
    given = {
        "targets": ["d"], "steps": 8, "batch_size": 6, "eval_points": 2, "model": {"name": "tiny"}, "device": "cpu",
        "few_shot": {"ways": 3, "shots": 2, "queries": 5}, "data": {"root": tasks}, "inner": {"optimizer": "sgd"},
    }  # fmt: skip
    return MetaTestConfig(**given | values)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"inner": {"optimizer": "nesterov", "lr": 0.1}, "schedule": "cosine"},
        {"inner": {"optimizer": "adam", "lr": 0.001}},
        {"inner": {"optimizer": "adamw", "lr": 0.001, "momentum": 0}},
        {"inner": {"clip": 0.1, "lr": 0.1}},
        {"inner": {"freeze_body": True}},
        {"model": {"name": "tiny", "body": ["norm"]}},  # frozen weights, different ones for every seed
        {"channels_last": True},
        {"few_shot": {"ways": 0}, "loss": {"name": "cross_entropy", "label_smoothing": 0.1}},
    ],
    ids=str,
)
def test_parameters_and_statistics_are_those_of_learners_alone(tasks, values):
    config = few_shot(tasks, **values)
    train = open_split("d", "train", config.data, CPU)
    alone, others = ([open_learner(config, "d", train, seed, CPU) for seed in range(4)] for _ in range(2))
    together = Together(others)
    rates = [make_schedule(each.optimizer, config.schedule, config.steps) for each in (*alone, together)]
    for _ in range(config.steps):
        for each, rate in zip((*alone, together), rates, strict=True):
            each.inner_step()
            rate.step()
        together.write_back()
        for learner, other in zip(alone, others, strict=True):
            for key, value in learner.model.state_dict().items():
                torch.testing.assert_close(other.model.state_dict()[key], value, atol=2e-5, rtol=1e-4)
    starts = [open_learner(config, "d", train, seed, CPU).flat.vector for seed in range(4)]
    assert all(not torch.equal(learner.flat.vector, start) for learner, start in zip(others, starts, strict=True))


def test_results_are_those_of_one_at_a_time_and_what_is_missing_is_run_again(tasks, tmp_path, monkeypatch):
    sizes, init = [], Together.__init__
    monkeypatch.setattr(Together, "__init__", lambda self, those: sizes.append(len(those)) or init(self, those))
    config = few_shot(tasks, seeds=5, steps=4, out=tmp_path, together=3)
    phi = open_learner(config, "d", open_split("d", "train", config.data, CPU), 7, CPU).model.state_dict()
    expected = run_jobs(few_shot(tasks, seeds=5, steps=4), {"phi": phi})
    assert sizes == []
    results = run_jobs(config, {"phi": phi})
    assert [(r["start"], r["seed"]) for r in results] == [(s, seed) for s in ("random", "phi") for seed in range(5)]
    for result, one in zip(results, expected, strict=True):
        assert result["curve"] == [pytest.approx(point, rel=1e-3) for point in one["curve"]]
    assert sizes == [1, *[3, 2] * 2]  # a step of one before the first job
    for name in ("d--phi--0", "d--phi--2"):
        (file,) = (tmp_path / "jobs").glob(f"{name}--*")
        file.unlink()
    sizes.clear()
    again = run_jobs(config, {"phi": phi})
    assert sizes == [1, 2]
    assert again[:5] == results[:5]
    for result, one in zip(again[5:], results[5:], strict=True):
        assert result["curve"] == [pytest.approx(point, rel=1e-3) for point in one["curve"]]


class Noisy(Tiny):
    def forward(self, x):
        return super().forward(nn.functional.dropout(x, 0.1, self.training))


class Measured(Tiny):
    def forward(self, x):
        return super().forward(x * float(x.mean()))


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (Noisy, r"^together: the model draws random numbers"),
        (Measured, r"^together: .*vmap: .*\.item\(\).*together=1$"),
    ],
)
def test_what_cannot_be_vectorized_is_refused_before_the_first_job(tasks, tmp_path, monkeypatch, model, text):
    monkeypatch.setitem(MODELS, "own", Architecture(model))
    with pytest.raises(ValueError, match=text):
        meta_test(few_shot(tasks, seeds=2, out=tmp_path, together=2, model={"name": "own"}))
    assert not [*(tmp_path / "jobs").iterdir()]


def test_only_fine_tuning_takes_steps_together(tasks):
    with pytest.raises(ValueError, match=r"together=2 with protocol=knn: only fine-tune adapts the model"):
        few_shot(tasks, together=2, protocol="knn")
    assert few_shot(tasks, data=DataConfig(root=tasks)).together == 1
