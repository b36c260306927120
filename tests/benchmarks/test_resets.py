"""What an episode resets: the runs that are compared, and the choice that needs no comparison."""

import pytest
import torch

from benchmarks.paper import resets, shift_error
from benchmarks.paper.long_horizon_runs import Study
from dist_cts.config import load
from dist_cts.run.config import TrainConfig


def test_runs_differ_in_their_resets_alone_and_are_paired_by_seed(tmp_path):
    configs = resets.ROOT / "configs"
    study = Study(
        configs / "long_horizon.yaml", configs / "long_horizon_meta_test.yaml", (), tmp_path, tmp_path, 200, 200, (100,)
    )
    wanted = resets.runs(2)
    assert len({run.name for run in wanted}) == len(wanted) == 8
    first = [study.training(run) for run in wanted[:4]]
    assert [(config.reset.head, config.reset.optimizer) for config in first] == [
        (False, False), (True, False), (False, True), (True, True),
    ]  # fmt: skip
    assert len({config.model_copy(update={"reset": None, "run_dir": None}).model_dump_json() for config in first}) == 1
    assert [run.seed for run in wanted] == [0] * 4 + [1] * 4


@pytest.mark.parametrize("key", ["head", "optimizer", "statistics"])
def test_only_head_and_optimizer_change_phi(key, tasks):
    values = ["tasks=[a, b]", f"data.root={tasks}", "batch_size=4", "model.name=tiny", "inner_steps=3", "episodes=2"]
    configs = [load(TrainConfig, None, [*values, *more]) for more in ((), (f"reset.{key}=true",))]
    kept, reset = (shift_error.run(config, ())[1] for config in configs)
    assert torch.equal(kept, reset) == (key == "statistics")
