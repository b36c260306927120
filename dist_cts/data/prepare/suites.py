"""Suites: several tasks by one name or one YAML file, prepared at once, with a table of what came out."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from dist_cts.config import read_yaml
from dist_cts.data.manifest import Manifest
from dist_cts.data.prepare import catalog
from dist_cts.data.prepare.archives import NotThere
from dist_cts.data.prepare.catalog import Entry
from dist_cts.data.prepare.task import Options, prepare, task_name

NAMES = ("paper-8", "paper-targets", "imagenet-8", "imagenet-targets", "demo")


FOLDER = r"^[^/\\\x00]*[^/\\\x00.][^/\\\x00]*$"  # a name that does not lead elsewhere


class Task(Options):
    """One task of a suite: a data set of the catalog and what to make of it."""

    dataset: str
    name: str | None = Field(None, pattern=FOLDER)  # its folder below the output; default: data set and class range
    root: Path | None = None  # its raw data; default: the folder of that name below the root, or the root
    expected: tuple[int, int, int] | None = None  # train images, test images, classes

    @property
    def entry(self) -> Entry:
        return catalog.entry(self.dataset)

    @property
    def options(self) -> Options:
        return Options(**{key: getattr(self, key) for key in Options.model_fields})

    def raw(self, root: Path | None) -> Path | None:
        """Where its raw data are, below a root that holds those of several data sets."""
        if self.root or root is None:
            return self.root and (root or Path()) / self.root
        names = (self.entry.folder or self.dataset, self.dataset)
        return next((root / name for name in names if (root / name).exists()), root)

    @property
    def counts(self) -> tuple[int, int, int] | None:
        """What should come out; None where nothing is known."""
        entry = self.entry
        if self.expected or not entry.counts or self.limit or self.split_classes or not entry.counts[1]:
            return self.expected
        return (*entry.counts, entry.classes)


def suite(name: str) -> list[Task]:
    """The tasks of a suite, or of a YAML file: a list of tasks, each with `dataset` and what differs from defaults.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: there is no such suite, or the file is not a list of tasks.
    """
    if name.endswith((".yaml", ".yml")):
        return _from_file(Path(name))
    if name == "demo":
        from dist_cts.data.prepare import embedded

        return [Task(dataset=catalog.EMBEDDED + task) for task in embedded.TASKS]
    if name == "paper-8":
        half = (50_000, 5_000, 100)
        return [
            Task(dataset="tiny-imagenet", split_classes=(0, 100), expected=half),
            Task(dataset="tiny-imagenet", split_classes=(100, 200), expected=half),
            *(Task(dataset=d) for d in ("cifar100", "stanford-dogs", "aircraft", "cub", "fashion-mnist", "svhn")),
        ]
    if name == "paper-targets":
        return [Task(dataset=d) for d in ("stanford-cars", "quickdraw", "flowers", "pets", "stl10")]
    if name == "imagenet-8":
        return [Task(dataset=f"imagenet-{number}") for number in range(1, 9)]
    if name == "imagenet-targets":
        return [
            *(Task(dataset=d, pixels=128, name=f"{d}-128px") for d in ("cifar100", "cifar10", "svhn")),
            *(
                Task(dataset=d, pixels=224, name=f"{d}-224px")
                for d in ("stanford-dogs", "pets", "flowers", "food101", "cub", "dtd")
            ),
        ]
    raise ValueError(f"there is no suite {name!r}; there are {', '.join(NAMES)}, or name a .yaml file of tasks")


def _from_file(path: Path) -> list[Task]:
    try:
        items = read_yaml(path)
        if not isinstance(items, list) or not items:
            raise ValueError(f"{path}: not a list of tasks")
        tasks = [Task.model_validate(item) for item in items]
        for task in tasks:
            catalog.entry(task.dataset)
    except ValidationError as error:
        fault = error.errors()[0]
        raise ValueError(f"{path}: {'.'.join(map(str, fault['loc']))}: {fault['msg']}") from None
    return tasks


Outcome = tuple[Manifest, Manifest] | Exception


def prepare_all(
    tasks: list[Task],
    root: Path | None,
    out: Path,
    workers: int,
    on_error: Literal["stop", "skip"],
    log: Callable[[str], object] = print,
    done: Callable[[Task, Path, Outcome], object] = lambda task, folder, outcome: None,
) -> list[Outcome]:
    """Prepares every task, several at a time, `workers` threads in all; what goes wrong with one does not stop others.

    `done(task, folder, outcome)` is called as each one ends. The outcome is the manifests or the error.
    """
    folders = [out / (task.name or task_name(task.entry, task.raw(root), task.options)) for task in tasks]
    if len(set(folders)) < len(folders):
        twice = next(folder for folder in folders if folders.count(folder) > 1)
        raise ValueError(f"two tasks would be written to {twice}; give them names")
    at_once = max(1, min(workers, len(tasks)))

    def one(task: Task, folder: Path) -> Outcome:
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


def verdict(task: Task, outcome: Outcome) -> str:
    """ok, differs, missing or failed."""
    if isinstance(outcome, FileNotFoundError | NotThere):
        return "missing"
    if isinstance(outcome, Exception):
        return "failed"
    train, test = outcome
    found = (train.count + len(train.skipped), test.count + len(test.skipped), train.classes)
    return "ok" if task.counts in (None, found) else "differs"


def table(tasks: list[Task], outcomes: list[Outcome]) -> str:
    """A line for every task: what was found, what was expected, the verdict, and what to do about it."""
    rows = [("data set", "train", "test", "classes", "pixels", "expected", "")]
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
