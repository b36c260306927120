"""Large-scale meta-learning with continual trajectory shifting, one task learner per rank.

from dist_cts import MetaTestConfig, TrainConfig, meta_test, train     (from a config)
from dist_cts import Stream, meta_test_tasks, meta_train_tasks         (from a script)
"""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "train": "dist_cts.run.train",
    "TrainConfig": "dist_cts.run.config",
    "meta_test": "dist_cts.run.meta_test",
    "MetaTestConfig": "dist_cts.run.meta_test",
    "load_phi": "dist_cts.checkpoint.phi",
    # From a script, without a config file.
    "meta_train_tasks": "dist_cts.run.script",
    "meta_test_tasks": "dist_cts.run.script",
    # The tables that take rows of your own, and their rows.
    "DATASETS": "dist_cts.data.datasets",
    "Stream": "dist_cts.data.streams",
    "HuggingFace": "dist_cts.data.hugging_face",
    "MODELS": "dist_cts.models",
    "Architecture": "dist_cts.models",
    "LOSSES": "dist_cts.losses",
    "Loss": "dist_cts.losses",
    "Metric": "dist_cts.losses",
    "ALGORITHMS": "dist_cts.algorithms.table",
    "Algorithm": "dist_cts.algorithms.table",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    """Imports late, as torch takes seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module 'dist_cts' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
