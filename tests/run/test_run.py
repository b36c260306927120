"""Runs in this process: interrupted at any step, they resume bit-identically to an uninterrupted run."""

import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from dist_cts.algorithms.table import MethodConfig
from dist_cts.checkpoint.files import OUTER
from dist_cts.checkpoint.schedule import CheckpointConfig
from dist_cts.config import find, load
from dist_cts.learner import InnerConfig, TaskLearner
from dist_cts.run import hooks
from dist_cts.run import train as training
from dist_cts.run.config import TrainConfig
from dist_cts.run.exit_codes import DONE, STOPPED
from dist_cts.run.hooks import Hooks
from tests.helpers.batches import write_task

K, M = 5, 3
# Steps after which the run is stopped and resumed, in order.
PATTERNS = {
    "after the first step": [1],
    "mid-episode": [K + 2],
    "at the last step of an episode": [K],
    "at the first step of the next": [K + 1],
    "twice in a row": [K + 2, K + 3],
    "in three episodes": [2, K + 1, 2 * K],
}


@pytest.fixture
def config(tasks, tmp_path):
    return TrainConfig(
        tasks=["a", "b"], episodes=M, inner_steps=K, meta_lr=0.5, batch_size=8, run_dir=tmp_path / "run", device="cpu",
        eval_every=3, model={"name": "tiny"}, data={"root": tasks}, checkpoint={"every_steps": 0},
        loggers=[],
    )  # fmt: skip


@pytest.fixture
def train(monkeypatch):
    """train(config, stop_after=None): exit code, every tensor at the end of the run, and its next 100 batches."""

    def train(config, stop_after=None):
        seen = {}
        after_step, finish = Hooks.__call__, training._finish

        def stopped(self):
            after_step(self)
            self.state.progress.stopping |= self.state.progress.step == stop_after

        def looked_at(config, state, *rest, **finished):
            code = finish(config, state, *rest, **finished)
            seen["phi"] = state.phi.clone()
            for learner in state.learners:
                seen.update({f"{learner.name}.{key}": v.clone() for key, v in learner.state_dict().items()})
                images, labels = zip(*(learner.batches.next() for _ in range(100)), strict=True)
                seen.update(
                    {f"{learner.name}.images": torch.stack(images), f"{learner.name}.labels": torch.stack(labels)}
                )
            return code

        with monkeypatch.context() as patch:
            patch.setattr(Hooks, "__call__", stopped)
            patch.setattr(training, "_finish", looked_at)
            return training.train(config), seen

    return train


def assert_same(seen, expected):
    assert seen.keys() == expected.keys()
    assert len(seen) > 10
    for name in seen:
        assert torch.equal(seen[name], expected[name]), name


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_resumed_run_has_every_tensor_and_the_next_100_batches_of_an_uninterrupted_one(
    train, config, tmp_path, pattern
):
    code, expected = train(config.model_copy(update={"run_dir": tmp_path / "uninterrupted"}))
    assert code == DONE
    for stop in PATTERNS[pattern]:
        assert train(config, stop)[0] == STOPPED
    code, seen = train(config)
    assert code == DONE
    assert_same(seen, expected)


def test_strong_augmentation_resumes_with_the_same_batches(train, config, tmp_path):
    data = load(TrainConfig, find("augmented")).data.model_copy(update={"root": config.data.root})
    config = config.model_copy(update={"data": data, "episodes": 2})
    _, expected = train(config.model_copy(update={"run_dir": tmp_path / "uninterrupted"}))
    assert train(config, K + 2)[0] == STOPPED
    assert_same(train(config)[1], expected)
    assert expected["a.labels"].is_floating_point()


def test_schedules_clipping_and_adamw_resume_bit_identically(train, config, tmp_path):
    shipped = load(TrainConfig, find("schedules"))
    update = {"inner": shipped.inner.model_copy(update={"warmup": 2}), "outer": shipped.outer, "algorithm": "reptile"}
    config = config.model_copy(update=update)
    _, expected = train(config.model_copy(update={"run_dir": tmp_path / "uninterrupted"}))
    assert train(config, K + 3)[0] == STOPPED
    assert load_file(config.run_dir / f"checkpoints/step-{K + 3:08}/outer.safetensors")["velocity"].any()
    assert_same(train(config)[1], expected)


def test_a_delayed_run_resumes_with_its_meta_updates_in_flight(train, config, tmp_path, capfd):
    shipped = load(TrainConfig, find("slow_network"))
    config = config.model_copy(update={"method": shipped.method, "wire": shipped.wire})
    _, now = train(config.model_copy(update={"method": MethodConfig(), "run_dir": tmp_path / "now"}))
    _, expected = train(config.model_copy(update={"run_dir": tmp_path / "uninterrupted"}))
    assert not torch.equal(expected["phi"], now["phi"])
    for stop in (K + 2, K + 3, 2 * K):
        assert train(config, stop)[0] == STOPPED
        (newest, *_) = sorted((config.run_dir / "checkpoints").iterdir(), reverse=True)
        assert (newest / OUTER).exists() == (stop != 2 * K)  # at an episode's end none is in flight
    assert_same(train(config)[1], expected)
    assert "warning: method.delay" not in capfd.readouterr().err
    train(config.model_copy(update={"meta_lr": 5.0, "run_dir": tmp_path / "unstable", "nonfinite": "skip"}))
    assert "warning: method.delay=2 is long for this meta_lr, momentum and K: " in capfd.readouterr().err


def test_few_shot_tasks_resume_in_the_middle_of_an_episode(train, config, tmp_path):
    values = config.model_dump() | {"tasks": ["a"], "few_shot": {"ways": 2, "shots": 3, "tasks": 2}, "eval_every": 0}
    config = TrainConfig.model_validate(values | {"reset": {"head": True}})
    _, expected = train(config.model_copy(update={"run_dir": tmp_path / "uninterrupted"}))
    assert train(config, K + 2)[0] == STOPPED
    assert_same(train(config)[1], expected)
    assert not torch.equal(expected["a-1.labels"], expected["a-2.labels"])


def test_a_pool_resumes_in_the_middle_of_an_episode_with_the_tasks_that_rest(train, config, tmp_path):
    names = [f"p{number}" for number in range(5)]
    for seed, name in enumerate(names):
        write_task(tmp_path / "pool", name, count=30, seed=seed)
    values = config.model_dump() | {"tasks": names, "tasks_per_episode": 2, "episodes": 5, "eval_every": 0}
    config = TrainConfig.model_validate(values | {"data": {"root": tmp_path / "pool"}})
    _, expected = train(config.model_copy(update={"run_dir": tmp_path / "uninterrupted"}))
    for stop in (K + 2, 3 * K, 3 * K + 1):
        assert train(config, stop)[0] == STOPPED
    assert_same(train(config)[1], expected)
    resting = [value for key, value in expected.items() if ".resting." in key and key.endswith("momentum_buffer")]
    assert len(resting) == 3  # of 5 tasks, 2 are not resting
    assert all(value.any() for value in resting)


@pytest.mark.parametrize(("name", "still"), [("anil", "body"), ("boil", "head")])
def test_anil_and_boil_are_configurations(train, config, name, still):
    shipped = load(TrainConfig, find(name))
    model = config.model.model_copy(update={"head": shipped.model.head})
    update = {"algorithm": shipped.algorithm, "inner": shipped.inner, "model": model, "episodes": 1, "eval_every": 0}
    seen, steps = {}, []

    def observed(self, batch, *rest):
        seen.setdefault(self.name, {n: p.detach().clone() for n, p in self.model.named_parameters()})
        found = step_on(self, batch, *rest)
        moved = {n for n, p in self.model.named_parameters() if not torch.equal(p, seen[self.name][n])}
        steps.append({"head" if n.startswith("fc.") else "body" for n in moved})
        return found

    step_on = TaskLearner.step_on
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskLearner, "step_on", observed)
        _, tensors = train(config.model_copy(update=update))
    assert all(moved == {"head", "body"} - {still} for moved in steps)
    assert tensors["phi"].any()


def test_a_signal_during_the_test_of_theta_stops_the_run_and_changes_nothing(train, config, tmp_path, monkeypatch):
    _, expected = train(config.model_copy(update={"run_dir": tmp_path / "uninterrupted"}))
    evaluate = Hooks.evaluate

    def signalled(self):
        signal.raise_signal(signal.SIGTERM)
        evaluate(self)

    with monkeypatch.context() as patch:
        patch.setattr(Hooks, "evaluate", signalled)
        assert train(config)[0] == STOPPED
    code, seen = train(config)
    assert code == DONE
    assert_same(seen, expected)


@pytest.mark.parametrize(("optimizer", "warned"), [("adam", True), ("sgd", False)])
def test_cts_with_adam_warns(train, config, capfd, optimizer, warned):
    train(config.model_copy(update={"inner": InnerConfig(optimizer=optimizer), "episodes": 1}))
    assert ("warning: inner.optimizer=adam" in capfd.readouterr().err) == warned


def test_a_loss_beyond_its_limit_is_reported_once_for_each_task(train, config, capfd):
    assert train(config.model_copy(update={"loss_limit": 0.01}))[0] == DONE
    lines = [line for line in capfd.readouterr().err.splitlines() if "diverges" in line]
    assert [line.split(": loss")[0] for line in lines] == [f"step 1: task {name} diverges" for name in "ab"]
    assert all("exceeds loss_limit=0.01; lower inner.lr or meta_lr" in line for line in lines)


def test_phi_is_compared_every_check_every_steps_and_before_each_checkpoint(train, config, monkeypatch):
    steps = []
    monkeypatch.setattr(hooks, "check_same_bits", lambda phi, step: steps.append(step))
    saved = CheckpointConfig(every_steps=6)
    assert train(config.model_copy(update={"check_every": 4, "checkpoint": saved}))[0] == DONE
    assert steps == [4, 6, 8, 12]


def test_a_snapshot_that_cannot_be_written_is_a_warning(train, config, capfd):
    config.run_dir.mkdir()
    (config.run_dir / "snapshots").touch()
    assert train(config.model_copy(update={"snapshot_every": K}))[0] == DONE
    warning = f"step {K}: snapshot failed: File exists ({config.run_dir / 'snapshots'}); training continues"
    assert [line for line in capfd.readouterr().err.splitlines() if "snapshot failed" in line] == [warning]


@pytest.mark.parametrize("writer", ["log_every", "snapshot_every"])
def test_whatever_writes_next_creates_a_deleted_folder_again(config, monkeypatch, writer):
    after_step, found = Hooks.__call__, set()

    def deleted(self):
        if self.state.progress.step == 2:
            shutil.rmtree(config.run_dir)
        after_step(self)
        if self.state.progress.step == 2:
            found.update(path.name for path in config.run_dir.iterdir())

    monkeypatch.setattr(Hooks, "__call__", deleted)
    assert training.train(config.model_copy(update={writer: 1, "eval_every": 0, "episodes": 1})) == DONE
    assert found >= {".lock", "config.yaml", "environment.json"}


def test_temporary_files_of_a_killed_run_are_removed_at_the_next_start(train, config):
    leftovers = [config.run_dir / "phi.safetensors.17.tmp", config.run_dir / "snapshots" / "phi_5.safetensors.17.tmp"]
    leftovers[1].parent.mkdir(parents=True)
    for path in leftovers:
        path.write_bytes(b"half")
    assert train(config)[0] == DONE
    assert not any(path.exists() for path in leftovers)


@pytest.mark.slow
def test_a_compiled_model_trains_like_the_plain_one(train, config, tmp_path):
    config = config.model_copy(update={"tasks": config.tasks[:1], "episodes": 1})
    _, plain = train(config)
    _, compiled = train(config.model_copy(update={"compile": True, "run_dir": tmp_path / "compiled"}))
    torch.testing.assert_close(compiled["phi"], plain["phi"], rtol=0, atol=1e-5)
