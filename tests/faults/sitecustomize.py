"""Imported by Python at start-up if this folder is in PYTHONPATH: injects the fault into ranks of torchrun."""

import os

if "FAULT" in os.environ and "RANK" in os.environ:
    import injected  # noqa: F401
