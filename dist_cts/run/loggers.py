"""Where scalars go besides metrics.jsonl: one row of LOGGERS each. A logger that fails loses records, never the run."""

import importlib.util
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any, Protocol

from dist_cts.atomic import replace_file
from dist_cts.registry import lookup
from dist_cts.run.console import log_rank0
from dist_cts.run.record_file import EventFile

CLOSING_SECONDS = 30.0  # for uploads at the end of a run; after a failure, when other ranks' lines wait, 5


@dataclass(frozen=True)
class LoggedRun:
    """What a logger is created from; `step`: where the run resumes, else 0."""

    folder: Path
    project: str
    config: Mapping[str, Any]
    step: int = 0

    @property
    def id(self) -> str:
        """Of this run folder: the same after a resume, a new one after --fresh. Kept in the file `logger_id`."""
        path = self.folder / "logger_id"
        if not path.exists():
            replace_file(path, uuid.uuid4().hex[:8].encode())
        return path.read_text()


class Logger(Protocol):
    """Takes scalars by tag, such as loss/digits. Steps may repeat where a run resumed."""

    def log(self, scalars: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, run: LoggedRun) -> None:
        self.file = EventFile(run.folder / "tensorboard", first_step=run.step + 1)

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        self.file.add_scalars(scalars, step)

    def close(self) -> None:
        self.file.close()


class WeightsAndBiases:
    """A W&B run; WANDB_MODE=offline keeps it in RUN/wandb, for `wandb sync`."""

    def __init__(self, run: LoggedRun) -> None:
        import wandb

        self.run = wandb.init(
            project=run.project,
            name=run.folder.name,
            id=run.id,
            resume="allow",
            dir=run.folder,
            config=dict(run.config),
            settings=wandb.Settings(init_timeout=60, silent=True),
        )
        self.run.define_metric("*", step_metric="step")  # W&B's own step must not decrease, and a resumed run's does

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        self.run.log({"step": step, **scalars})

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """A Trackio run, in a local database (TRACKIO_DIR) or a Space (TRACKIO_SPACE_ID)."""

    def __init__(self, run: LoggedRun) -> None:
        import trackio

        name = f"{run.folder.name}-{run.id}"
        self.run = trackio.init(project=run.project, name=name, resume="allow", config=dict(run.config))

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        self.run.log(dict(scalars), step=step)

    def close(self) -> None:
        self.run.finish()


class Curves:
    """RUN/curves.png, drawn when the run ends or stops."""

    def __init__(self, run: LoggedRun) -> None:
        self.folder, self.recorded = run.folder, False

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        self.recorded = True

    def close(self) -> None:
        from dist_cts.run.curves import draw_curves  # late: matplotlib and scipy take a second

        if self.recorded:
            draw_curves([self.folder], self.folder / "curves.png")


LOGGERS: dict[str, Callable[[LoggedRun], Logger]] = {
    "tensorboard": TensorBoard,
    "curves": Curves,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
}
EXTRAS = "wandb", "trackio"  # optional packages and extras of the same names


class Loggers:
    """The loggers of a run. The first failure of each is reported; training continues."""

    def __init__(self, names: Sequence[str] = (), run: LoggedRun | None = None) -> None:
        self._failed: set[str] = set()
        self._loggers: dict[str, Logger] = {}
        for name in names:
            with self._best_effort(name):
                self._loggers[name] = LOGGERS[name](run)

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        """Passes scalars to every logger."""
        for name, logger in self._loggers.items():
            with self._best_effort(name):
                logger.log(scalars, step)

    def close(self, failed: bool = False) -> None:
        """Ends the loggers. One that hangs, e.g. uploading without a network, is left behind after a deadline.

        After a failure in silence: the line that says why the run failed is the last one.
        """
        self._failed.update(self._loggers if failed else ())
        for name, logger in self._loggers.items():
            with self._best_effort(name):
                _within(5.0 if failed else CLOSING_SECONDS, logger.close)

    @contextmanager
    def _best_effort(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of any kind: they come from packages that are not ours
            if name not in self._failed:
                cause = " ".join(str(error).split()) or type(error).__name__
                log_rank0(f"warning: logger {name}: records lost: {cause}; training continues")
            self._failed.add(name)


def check_loggers(names: Sequence[str]) -> None:
    """Raises ValueError for an unknown logger, or one whose package is not installed."""
    for name in names:
        lookup("loggers", name, LOGGERS)
        if name in EXTRAS and importlib.util.find_spec(name) is None:
            raise ValueError(f"loggers: {name} is not installed; pip install 'dist_cts[{name}]', or leave it out")


def _within(seconds: float, action: Callable[[], None]) -> None:
    """Runs `action` in a thread and waits for it; raises what it raises, or TimeoutError."""
    errors: list[Exception] = []

    def run() -> None:
        try:
            action()
        except Exception as error:
            errors.append(error)

    thread = Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"not finished after {seconds:.0f} s")
    if errors:
        raise errors[0]
