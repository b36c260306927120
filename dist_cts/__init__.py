"""Large-scale meta-learning with continual trajectory shifting, one task learner per rank.

from dist_cts import MetaTestConfig, TrainConfig, meta_test, train
"""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "train": "dist_cts.run.train",
    "TrainConfig": "dist_cts.run.config",
    "meta_test": "dist_cts.run.meta_test",
    "MetaTestConfig": "dist_cts.run.meta_test",
    "load_phi": "dist_cts.checkpoint.phi",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    """Imports late, as torch takes seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module 'dist_cts' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
