"""The package `benchmarks` for `python benchmarks/paper/NAME.py`, where sys.path starts with this folder."""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[1])]
