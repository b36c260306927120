"""Meta-training and meta-test from a script or a notebook: no config file, no torchrun, no folder.

Under torchrun, the same script uses all ranks.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from dist_cts.checkpoint.phi import Source
from dist_cts.data.datasets import DATASETS
from dist_cts.data.streams import Stream
from dist_cts.losses import Metric, make_loss
from dist_cts.models import MODELS, Architecture
from dist_cts.run.config import TrainConfig
from dist_cts.run.curves import read_records
from dist_cts.run.meta_test import MetaTestConfig, run_jobs
from dist_cts.run.report import Summary, markdown, summarize
from dist_cts.run.train import Trained, run

Model = str | dict[str, Any] | Callable[[int], nn.Module]


def meta_train_tasks(tasks: Mapping[str, Any], model: Model, *, head: str | None = None, **settings: Any) -> Trained:
    """Meta-trains phi over tasks given as objects; the same loop, methods and checks as `train`.

    Args:
        tasks: by name, rows of DATASETS: a Stream of batches, or a function of the split that returns a dataset.
        model: a name, a section `model` of the configuration, or a function of the number of outputs that builds a
            module, such as its class.
        head: of such a module: the name of its head, which every task has for itself; default: its last linear layer.
        settings: the keys of TrainConfig but for `tasks` and `model`; sections as dicts. With `run_dir` the run has a
            folder, as `train` has: metrics, checkpoints from which the same call resumes, phi.safetensors.

    Returns:
        phi, and the history of loss and metric per task, on every rank.

    Raises:
        ValueError: a setting, a task or the model is not valid.
        RunError: the run failed.
    """
    config = TrainConfig(tasks=_register(tasks), model=_model(model, head), **settings)
    if config.run_dir is None and config.snapshot_every:
        raise ValueError(f"snapshot_every={config.snapshot_every}: set run_dir too, the folder of the snapshots")
    trained = run(config)
    return trained if config.run_dir is None else replace(trained, history=list(read_records(config.run_dir)))


@dataclass(frozen=True)
class Tested:
    """A meta-test. `summary`: by start and target, as in meta_test.json; `results`: the curve of every job.

    `print` shows the table.
    """

    summary: Summary
    results: list[dict[str, Any]]
    metric: Metric

    def __str__(self) -> str:
        targets = list(next(iter(self.summary.values())))
        return markdown(self.summary, targets, metric=self.metric)


def meta_test_tasks(
    tasks: Mapping[str, Any], starts: Mapping[str, Source], model: Model, *, head: str | None = None, **settings: Any
) -> Tested:
    """Adapts each initialization, and a random one, to each held-out task: the paper's meta-test.

    Args:
        tasks, model, head: as of `meta_train_tasks`; the tasks need test batches.
        starts: the initializations by name: phi of `meta_train_tasks`, or what `load_phi` reads.
        settings: the keys of MetaTestConfig but for `targets` and `model`. `out` keeps the results in a folder.

    Raises:
        ValueError, FileNotFoundError: a setting, a task or an initialization is not valid.
    """
    config = MetaTestConfig(targets=_register(tasks), model=_model(model, head), **settings)
    metric, results = make_loss(config.loss).reported, run_jobs(config, starts)
    return Tested(summarize(results, config.target_names, metric), results, metric)


def _register(tasks: Mapping[str, Any]) -> list[str]:
    for name, task in tasks.items():
        if not (isinstance(task, Stream) or callable(task)):
            raise ValueError(
                f"task {name}: expected a Stream, or a function of the split (train, test) that returns a dataset, "
                f"not a {type(task).__name__}"
            )
    DATASETS.update(tasks)
    return list(tasks)


def _model(model: Model, head: str | None) -> Any:
    if not callable(model):
        return {"name": model} if isinstance(model, str) else model
    name = getattr(model, "__name__", type(model).__name__)
    MODELS[name] = Architecture(model, head)
    return {"name": name}
