"""Modules of one's own, by --import: they register models, losses, methods and datasets before the config is read."""

import importlib
import json
import os
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path

from dist_cts.errors import RunError

ENVIRONMENT = "environment.json"  # of a run folder; lists the imports
IMPORTED: list[str] = []  # as given, in order


def import_modules(sources: Iterable[str]) -> None:
    """Imports modules by name, from the working directory or installed, and .py files by path.

    Raises:
        FileNotFoundError: not found.
        ValueError: a file has the name of another module.
        RunError: the module's own code fails; names the exception and the line.
    """
    for source in sources:
        path, name = Path(source), _module_name(source)
        is_file = path.suffix == ".py"
        folder = str(path.resolve().parent if is_file else Path.cwd())
        if folder not in sys.path:
            sys.path.insert(0, folder)
        if is_file and not path.is_file():
            raise FileNotFoundError(f"--import {source}: file not found (working directory: {Path.cwd()})")
        try:
            module = importlib.import_module(name)
        except Exception as error:
            if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
                raise FileNotFoundError(
                    f"--import {source}: no module of that name in {Path.cwd()} or installed; for a file write its path"
                ) from None
            place = traceback.extract_tb(error.__traceback__)[-1]
            fault = f"--import {source}: {type(error).__name__}: {error} ({place.filename}, line {place.lineno})"
            raise RunError(fault, _speaker()) from error
        if is_file and Path(module.__file__ or "").resolve() != path.resolve():
            raise ValueError(f"--import {source}: {name!r} is already the name of {module.__file__}; rename the file")
        IMPORTED.append(source)


def check_imports(run_dir: Path) -> None:
    """Verifies that a resumed run has all modules of the run that wrote the folder.

    Raises:
        ValueError: one is missing.
    """
    try:
        recorded = json.loads((run_dir / ENVIRONMENT).read_text()).get("imports", [])
    except (OSError, ValueError):
        return  # a new run, or an older one
    missing = [source for source in recorded if _module_name(source) not in sys.modules]
    if missing:
        again = " ".join(f"--import {source}" for source in missing)
        raise ValueError(f"{run_dir} was started with its own code: add {again} to resume it")


def _module_name(source: str) -> str:
    return Path(source).stem if source.endswith(".py") else source


def _speaker() -> int:
    """One rank per node: all of them usually fail alike."""
    return int(os.environ.get("RANK", 0)) - int(os.environ.get("LOCAL_RANK", 0))
