"""Python runs this at its start where this folder is in PYTHONPATH: ranks of torchrun get their fault here."""

import os

if "FAULT" in os.environ and "RANK" in os.environ:
    import injected  # noqa: F401
