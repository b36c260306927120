"""Suites: several tasks prepared by one command, defined by name or YAML file, and a table of the results."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from dist_cts.config_faults import explain
from dist_cts.data.manifest import TASK_NAME, Manifest
from dist_cts.data.prepare import catalog
from dist_cts.data.prepare.archives import NotThere
from dist_cts.data.prepare.catalog import Entry
from dist_cts.data.prepare.task import Options, prepare, task_name
from dist_cts.yaml_file import Places, read_placed, read_yaml

_BUILT_IN = read_yaml(Path(__file__).with_name("suites.yaml"))
NAMES = tuple(_BUILT_IN)


class SuiteTask(Options):
    """One task of a suite: a dataset of the catalog and how to prepare it."""

    dataset: str
    name: str | None = Field(None, pattern=TASK_NAME)  # its folder; default: dataset and class range
    root: Path | None = None  # its raw data; default: the subfolder of the root with its name, or the root
    expected: tuple[int, int, int] | None = None  # train images, test images, classes

    @property
    def entry(self) -> Entry:
        return catalog.entry(self.dataset)

    @property
    def options(self) -> Options:
        return Options(**{key: getattr(self, key) for key in Options.model_fields})

    def raw(self, root: Path | None) -> Path | None:
        """Its raw data, given the root folder of several datasets."""
        if self.root or root is None:
            return self.root and (root or Path()) / self.root
        names = (self.entry.folder or self.dataset, self.dataset)
        return next((root / name for name in names if (root / name).exists()), root)

    @property
    def counts(self) -> tuple[int, int, int] | None:
        """Expected train images, test images and classes; None if unknown."""
        entry = self.entry
        if self.expected or not entry.counts or self.limit or self.split_classes or not entry.counts[1]:
            return self.expected
        return (*entry.counts, entry.classes)


def suite(name: str) -> list[SuiteTask]:
    """The tasks of a built-in suite, or of a YAML file with a list of SuiteTask.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: unknown suite, or the file is not a valid list of tasks.
    """
    path = Path(name)
    if name not in NAMES and path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"unknown suite {name!r}; expected {', '.join(NAMES)}, or a .yaml file with a list of tasks")
    items, places = (_BUILT_IN[name], {}) if name in NAMES else read_placed(path)
    if not isinstance(items, list) or not items:
        raise ValueError(f"{path}: expected a list of tasks, each with the key `dataset`")
    return [_task(item, _below(places, str(number)), f"{path}: task {number + 1}") for number, item in enumerate(items)]


def _task(item: Any, places: Places, where: str) -> SuiteTask:
    try:
        task = SuiteTask.model_validate(item)
        catalog.entry(task.dataset)
    except ValidationError as error:
        raise ValueError(explain(SuiteTask, error, item, places, where)) from None
    except ValueError as error:
        raise ValueError(f"{places.get(('dataset',), where)}: {error}") from None
    return task


def _below(places: Places, key: str) -> Places:
    return {path[1:]: place for path, place in places.items() if path[:1] == (key,)}


Outcome = tuple[Manifest, Manifest] | Exception


def prepare_all(
    tasks: list[SuiteTask],
    root: Path | None,
    out: Path,
    workers: int,
    on_error: Literal["stop", "skip"],
    log: Callable[[str], object] = print,
    done: Callable[[SuiteTask, Path, Outcome], object] = lambda task, folder, outcome: None,
) -> list[Outcome]:
    """Prepares tasks in parallel with `workers` threads in total; an error in one task does not stop the others.

    Calls `done(task, folder, outcome)` as each task ends; an outcome is a pair of manifests or the error.

    Raises:
        ValueError: two tasks would be written to the same folder.
    """
    folders = [out / (task.name or task_name(task.entry, task.raw(root), task.options)) for task in tasks]
    if len(set(folders)) < len(folders):
        twice = next(folder for folder in folders if folders.count(folder) > 1)
        raise ValueError(f"two tasks would be written to {twice}; give them different names")
    at_once = max(1, min(workers, len(tasks)))

    def one(task: SuiteTask, folder: Path) -> Outcome:
        try:
            outcome = prepare(task.entry, task.raw(root), folder, task.options, workers // at_once, on_error, log)
        except (ValueError, OSError, ImportError) as fault:
            outcome = fault
        done(task, folder, outcome)
        return outcome

    pool = ThreadPoolExecutor(at_once)
    try:
        return list(pool.map(one, tasks, folders))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def verdict(task: SuiteTask, outcome: Outcome) -> str:
    """ok, differs (from the expected counts), missing (raw data not found) or failed."""
    if isinstance(outcome, FileNotFoundError | NotThere):
        return "missing"
    if isinstance(outcome, Exception):
        return "failed"
    train, test = outcome
    found = (train.count + len(train.skipped), test.count + len(test.skipped), train.classes)
    return "ok" if task.counts in (None, found) else "differs"


def table(tasks: list[SuiteTask], outcomes: list[Outcome]) -> str:
    """One row per task: counts found and expected, the verdict, and what to do about it."""
    rows = [("dataset", "train", "test", "classes", "pixels", "expected", "")]
    for task, outcome in zip(tasks, outcomes, strict=True):
        name = task.name or "-".join([task.dataset.removeprefix(catalog.EMBEDDED), *map(str, task.split_classes or ())])
        expected = " / ".join(f"{number:,}" for number in task.counts) if task.counts else "-"
        result, found = verdict(task, outcome), ("-", "-", "-", "-")
        if not isinstance(outcome, Exception):
            train, test = outcome
            found = (f"{train.count:,}", f"{test.count:,}", str(train.classes), str(train.pixels))
        advice = {"missing": f": {task.entry.where}", "failed": f": {outcome}"}.get(result, "")
        rows.append((name, *found, expected, result + advice))
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:6], widths[1:]), row[6]]).rstrip() for row in rows
    )
