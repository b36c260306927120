"""Few-shot tasks: what an episode holds, on any layout, and the meta-test on them."""

import numpy as np
import pytest
import torch

from dist_cts.config import find, load
from dist_cts.data.batches import DataConfig, TaskBatches, open_task
from dist_cts.data.few_shot import FewShotConfig, FewShotPlan, FewShotSplit, draw_queries, draw_task
from dist_cts.data.plan import SamplePlan
from dist_cts.data.tasks import open_split
from dist_cts.learner import TaskLearner
from dist_cts.run.config import TrainConfig
from dist_cts.run.meta_test import Job, MetaTestConfig, adapt
from tests.helpers.commands import assert_equal, phi

CPU = torch.device("cpu")
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 7))
FEW = FewShotConfig(ways=4, shots=3)
PLAN = FewShotPlan(SamplePlan(3, "noise", 12, 5, padding=0), LABELS, FEW, K=6)


def test_an_episode_has_n_classes_of_k_images_with_labels_from_0():
    seen = set()
    for m in range(50):
        chunk = PLAN.chunk(6 * m, 6)
        pairs = set(zip(chunk.index.ravel().tolist(), chunk.label.ravel().tolist(), strict=True))
        assert len(pairs) == 12  # 30 slots: two and a half epochs of 12 images
        classes = {label: {int(LABELS[i]) for i, other in pairs if other == label} for label in range(4)}
        assert all(len(found) == 1 for found in classes.values())
        assert sorted(np.bincount([label for _, label in pairs])) == [3] * 4
        chosen, images = draw_task(LABELS, FEW, 3, "noise", m)
        assert [classes[label] for label in range(4)] == [{label} for label in chosen]
        assert {i for i, _ in pairs} == set(images)
        seen.add(tuple(chosen))
    assert len(seen) > 45
    assert {label for chosen in seen for label in chosen} == set(range(10))


def test_a_stretch_does_not_depend_on_where_it_starts():
    whole = PLAN.chunk(0, 40)
    for start, steps in ((0, 6), (4, 13), (39, 1)):
        for part, array in zip(PLAN.chunk(start, steps), whole, strict=True):
            assert np.array_equal(part, array[start : start + steps])


def test_too_few_classes_are_refused_with_both_numbers():
    with pytest.raises(ValueError, match="task noise: few_shot needs 4 classes of 8 images, only 0 of its 10 have"):
        draw_task(LABELS, FewShotConfig(ways=4, shots=8), 0, "noise")


def test_the_slices_of_data_ranks_make_the_whole_batch(tasks):
    source = open_task(tasks / "d", "train", DataConfig(), CPU)
    options = {"few_shot": FEW, "inner_steps": 5}
    whole = TaskBatches(source, 0, 6, DataConfig(), **options)
    ranks = [TaskBatches(source, 0, 6, DataConfig(), data_rank=rank, data_ranks=3, **options) for rank in range(3)]
    for _ in range(12):
        images, labels = (torch.cat(pieces) for pieces in zip(*(rank.next() for rank in ranks), strict=True))
        expected = whole.next()
        assert torch.equal(images, expected[0])
        assert torch.equal(labels, expected[1])
        assert labels.max() < 4


def test_a_split_of_queries_has_the_labels_of_the_episode(tasks):
    test = open_split("d", "test", DataConfig(root=tasks), CPU)
    chosen = np.array([5, 0, 3])
    split = FewShotSplit(test, chosen, draw_queries(test.labels, chosen, 4, 1))
    images, labels = (torch.cat(pieces) for pieces in zip(*split.test_batches(5), strict=True))
    assert labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4 == split.labels.tolist()
    everything = torch.cat([images for images, _ in test.test_batches(100)])
    for image, label in zip(images, labels, strict=True):
        (found,) = [i for i, other in enumerate(everything) if torch.equal(image, other)]
        assert test.labels[found] == chosen[label]


@pytest.mark.parametrize("protocol", ["fine-tune", "knn"])
def test_a_meta_test_trains_on_the_shots_and_scores_the_queries(tasks, monkeypatch, protocol):
    config = MetaTestConfig(
        targets=["d"], steps=4, batch_size=6, eval_points=1, few_shot={"ways": 3, "shots": 2, "queries": 5},
        model={"name": "tiny"}, data={"root": tasks, "padding": 0, "flip": False}, protocol=protocol,
    )  # fmt: skip
    trained, evaluated = [], []
    step_on, evaluate = TaskLearner.step_on, TaskLearner.evaluate
    monkeypatch.setattr(TaskLearner, "step_on", lambda self, batch, *_: trained.append(batch) or step_on(self, batch))
    monkeypatch.setattr(
        TaskLearner, "evaluate", lambda self, batches: evaluate(self, (evaluated.append(b) or b for b in batches))
    )
    accuracies = [adapt(config, [Job("d", "random", None, seed)], CPU)[0][-1]["accuracy"] for seed in range(20)]
    assert all((15 * value) == pytest.approx(round(15 * value), abs=1e-4) for value in accuracies)
    assert np.mean(accuracies) > 0.5  # a class is a color
    labels = torch.cat([labels for _, labels in evaluated])
    assert len(labels) == 20 * (15 if protocol == "fine-tune" else 15 + 6)
    if protocol == "fine-tune":
        for first in trained[::4]:
            assert sorted(first[1].tolist()) == [0, 0, 1, 1, 2, 2]


def test_the_shipped_configuration_expands_its_pool():
    config = load(TrainConfig, find("omniglot"))
    assert config.task_names == [f"omniglot-{number}" for number in range(1, 6)]
    assert {task.pool for task in config.tasks} == {"omniglot"}
    assert TrainConfig.model_validate(config.model_dump(mode="json")) == config
    assert load(MetaTestConfig, find("omniglot_meta_test")).few_shot.shots == 1
    with pytest.raises(ValueError, match=r"few_shot.ways=1: a task needs 2 classes or more"):
        load(TrainConfig, find("omniglot"), ["few_shot.ways=1"])
    with pytest.raises(ValueError, match=r"set reset.head=true"):
        load(TrainConfig, find("omniglot"), ["reset.head=false"])


def test_phi_is_the_same_on_1_and_2_ranks(start, tasks, tmp_path):
    keys = ["tasks=[d]", "few_shot={ways: 3, shots: 2, tasks: 4}", f"data.root={tasks}", "model={name: tiny}"]
    keys += ["episodes=3", "inner_steps=4", "batch_size=6", "reduction=ordered", "device=cpu", "loggers=[]"]
    for ranks in (None, 2):
        command = start("train.py", "--config", "omniglot", *keys, f"run_dir={tmp_path / str(ranks)}", forked=ranks)
        code, _, err = command.finish()
        assert code in (0, [0, 0]), err
    assert_equal(phi(tmp_path / "None"), phi(tmp_path / "2"))
