"""CheckpointManager: when to save, how all ranks publish one checkpoint together, and how a run resumes."""

import logging
import re
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

from pydantic import TypeAdapter
from torch import Tensor

from dist_cts.atomic import fsync_folder, publish, replace_file
from dist_cts.checkpoint.files import (
    OUTER,
    PHI,
    CheckpointManifest,
    State,
    StoredFile,
    read_manifest,
    read_state,
    set_aside,
    step_folder,
    task_file,
    to_host,
    write_manifest,
    write_state,
)
from dist_cts.checkpoint.schedule import CheckpointConfig, Schedule
from dist_cts.checkpoint.settings import MAY_DIFFER, config_difference, with_new_keys
from dist_cts.config import Config
from dist_cts.distributed.placement import Placement
from dist_cts.distributed.process_group import from_rank_0, gather, raise_on_all_ranks
from dist_cts.errors import RepeatedWarning, RunError, cause_of, on_all_ranks
from dist_cts.flat import load_named
from dist_cts.state import TrainState

PATIENCE = 300.0  # seconds that rank 0 waits for the other ranks' files
_FILES = TypeAdapter(dict[str, StoredFile])
log = logging.getLogger(__name__)


class _Report(NamedTuple):
    """State of each rank before a save; all ranks decide from the gathered reports."""

    busy: bool
    newest: int | None
    token: str
    failing: float  # seconds since the first failure after the newest checkpoint
    error: Exception | None  # why the run folder cannot be written at all


class CheckpointManager:
    """The checkpoints of one run. Every rank calls every method at the same step; only rank 0 warns.

    A save copies the state to the host; a thread on each rank writes it. The threads synchronize through files in a
    shared folder, not through collectives, which could interleave with those of training: each rank writes its files,
    then a list of them; rank 0 waits for all lists, writes the manifest and publishes the checkpoint by a rename.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        placement: Placement,
        warn: Callable[[str], object] = log.warning,
        restore: Callable[[], object] = lambda: None,
    ) -> None:
        """Creates `folder` and removes incomplete checkpoints; the caller holds the run's lock.

        `restore` is called before each save, to create a deleted run folder again.

        Raises:
            OSError: the folder cannot be created.
        """
        self.folder, self.config, self.placement, self._schedule = folder, config, placement, Schedule(config)
        self.due = self._schedule.due
        self.warn = warn if placement.rank == 0 else lambda text: None
        self.fault = ""  # why the latest save failed, on rank 0
        self.newest: int | None = None  # step of the newest valid checkpoint known to this rank
        self._restore, self._warn_repeated = restore, RepeatedWarning(self.warn)
        self._failing_since: float | None = None
        self._thread: Thread | None = None
        self._copies: dict[str, dict[str, Tensor]] = {}  # reused: allocating costs more than copying
        with raise_on_all_ranks():
            if placement.rank == 0:
                folder.mkdir(parents=True, exist_ok=True)
                self._remove_leftovers()

    def steps(self) -> list[int]:
        """The steps that have a checkpoint folder, oldest first; only loading verifies them."""
        names = (re.fullmatch(r"step-(\d{8,})", path.name) for path in self.folder.iterdir())
        return sorted(int(name[1]) for name in names if name)

    def save(self, state: TrainState, config: Config, wait: bool = False) -> bool:
        """Starts saving the state and the run's config. Training may continue when this returns.

        A failure (full disk, non-finite tensor) or an earlier save still running is reported as a warning; the last
        valid checkpoint stays. `wait` waits for an earlier save and for this one: for the end of a run.

        Returns:
            Whether the save has started; with `wait`, whether the step has a valid checkpoint. The same on every rank.

        Raises:
            RunError: another run uses the folder, or, without `wait`, every save failed for `give_up_minutes`.
        """
        if wait:
            self.wait()
        step = state.progress.step
        self._schedule.saved(step)
        reports = gather(self._report())
        first = reports[0]
        if isinstance(first.error, RunError):
            raise first.error
        if first.newest == step:
            return True
        overdue = 0 < 60 * self.config.give_up_minutes <= first.failing
        saved = self._start(state, config, reports) and (not (wait or overdue) or self.wait() == step)
        if overdue and not saved and not wait:
            raise RunError(
                f"step {step}: no checkpoint could be saved for {first.failing / 60:.0f} minutes ({self.fault}); "
                f"{self._last_valid()}. Make {self.folder} writable, then run the same command to resume"
            )
        return saved

    def _report(self) -> _Report:
        error = None
        if self.placement.rank == 0:
            try:
                if not (self._busy() or (self.folder / step_folder(self.newest or 0)).exists()):  # deleted
                    self.newest = None
                self._restore()
                self.folder.mkdir(exist_ok=True)
            except (OSError, RunError) as caught:
                error = caught
        failing = 0.0 if self._failing_since is None else time.monotonic() - self._failing_since
        return _Report(self._busy(), self.newest, uuid.uuid4().hex[:8], failing, error)

    def _start(self, state: TrainState, config: Config, reports: Sequence[_Report]) -> bool:
        """Copies the state and starts this rank's thread; False on all ranks if a save is not possible now."""
        step, learners = state.progress.step, state.learners
        if any(report.busy for report in reports):
            self._failed(step, "an earlier one is still being written")
            return False
        if reports[0].error:
            self._failed(step, cause_of(reports[0].error))
            return False
        states: dict[str, State] = {task_file(learner.name): learner.state_dict() for learner in learners}
        layouts = {task_file(learner.name): learner.flat.layout.fingerprint() for learner in learners}
        contents = {task_file(learner.name): learner.data_fingerprint for learner in learners}
        if self.placement.rank == 0:
            states[PHI], layouts[PHI] = state.layout.views(state.phi), state.fingerprint
            if outer := state.outer_state():
                states[OUTER], layouts[OUTER] = outer, layouts[PHI]
        if self.placement.contributes:  # the ranks of a data group hold the same bits: only the first saves
            self._copies = {name: to_host(tensors, self._copies.get(name, {})) for name, tensors in states.items()}
            # Named by rank 0's token, so that files of an earlier attempt at this step cannot get in.
            temporary = self.folder / f"{step_folder(step)}.{reports[0].token}.tmp"
            values = config.model_dump(mode="json")
            # A daemon: a failing rank must not wait for the files of ranks that may have failed before it.
            self._thread = Thread(
                target=self._write, args=(temporary, step, self._copies, layouts, contents, values), daemon=True
            )
            self._thread.start()
        return True

    def _failed(self, step: int, fault: str) -> None:
        self.fault = fault
        self._failing_since = self._failing_since or time.monotonic()
        self._warn_repeated(
            f"checkpoint failed: {fault}", f"; training continues, {self._last_valid()}", f"step {step}: "
        )

    def _last_valid(self) -> str:
        return "no valid checkpoint yet" if self.newest is None else f"the latest valid one is at step {self.newest}"

    def wait(self) -> int | None:
        """Waits for a running save on all ranks; returns the step of the newest valid checkpoint, or None.

        The ranks exchange messages while waiting, so that a slow disk does not look like a lost rank.
        """
        while any(gather(self._busy())):
            if self._thread is not None:
                self._thread.join(0.1)
        self.newest = from_rank_0(self.newest)
        return self.newest

    def load_newest(self, state: TrainState, config: Config, may_differ: Sequence[str] = MAY_DIFFER) -> int | None:
        """Restores phi, learners, progress and the batches' position from the newest valid checkpoint.

        A checkpoint that any rank finds truncated or corrupt is reported and renamed to step-S.damaged; the one
        before it is used.

        Returns:
            The step of the checkpoint; None if there is no checkpoint.

        Raises:
            ValueError: there are checkpoints but none is valid, or the config or the model does not fit them.
        """
        damaged: list[Path] = []
        for step in reversed(from_rank_0(self.steps() if self.placement.rank == 0 else [])):
            path = self.folder / step_folder(step)
            states = self._read(path, state, config, may_differ)
            if states is None:
                damaged.append(path)
                continue
            load_named(state.layout, state.phi, states[PHI])
            state.load_outer_state(states.get(OUTER, {}))
            for learner in state.learners:
                learner.load_state_dict(states[task_file(learner.name)])
                learner.seek(step)
            state.progress.step = self.newest = step
            self._schedule.resumed(step)
            if self.placement.rank == 0:
                set_aside(damaged)
            return step
        if damaged:
            fault = f"{self.folder}: no valid checkpoint among {len(damaged)}; restore one or pass --fresh"
            raise on_all_ranks(ValueError(fault))
        return None

    def _read(
        self, path: Path, state: TrainState, config: Config, may_differ: Sequence[str]
    ) -> dict[str, dict[str, Tensor]] | None:
        """This rank's files of a checkpoint; None if any rank finds it damaged."""
        fault = None
        try:
            manifest = read_manifest(path)
            names = [PHI, *(task_file(learner.name) for learner in state.learners)]
            names += [OUTER] if OUTER in manifest.files else []
            states = {name: read_state(path / name, manifest) for name in names}
        except (OSError, ValueError) as error:
            fault = str(error)
        if faults := [fault for fault in gather(fault) if fault]:
            self.warn(f"skipping a damaged checkpoint: {faults[0]}")
            return None
        with raise_on_all_ranks():
            saved = with_new_keys(manifest.config, config)
            differing = config_difference(saved, config.model_dump(mode="json"), may_differ)
            if differing:
                raise ValueError(
                    f"the config does not match checkpoint {path}: {'; '.join(differing)}; restore these values, "
                    "choose another run_dir, or pass --fresh"
                )
            layouts = {task_file(learner.name): learner.flat.layout.fingerprint() for learner in state.learners}
            for name, now in {PHI: state.fingerprint, **layouts}.items():
                if manifest.files[name].layout != now:
                    frozen = ", or with other frozen weights: restore `init`" if name == PHI and state.rest else ""
                    raise ValueError(
                        f"{path / name} was saved from a model with other tensors, shapes or strides{frozen}"
                    )
            for learner in state.learners:
                saved_data, data = manifest.files[task_file(learner.name)].data, learner.data_fingerprint
                if saved_data not in ("", data):
                    raise ValueError(
                        f"task {learner.name}: its training data changed since checkpoint {path}: {saved_data}, now "
                        f"{data or 'unknown'}; restore them, or pass --fresh"
                    )
        return states

    def _busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _write(
        self,
        temporary: Path,
        step: int,
        states: dict[str, State],
        layouts: dict[str, str],
        contents: dict[str, str],
        config: dict[str, Any],
    ) -> None:
        """Runs in the thread: writes this rank's files and their list; rank 0 collects all lists and publishes."""
        rank = self.placement.rank
        try:
            if rank == 0:
                self._remove_leftovers(but=temporary)  # no earlier save is running on any rank
            temporary.mkdir(exist_ok=True)
            files = {
                name: write_state(temporary / name, state, layouts[name], contents.get(name, ""))
                for name, state in states.items()
            }
            if rank != 0:
                fsync_folder(temporary)
                replace_file(temporary / f"rank-{rank}.json", _FILES.dump_json(files))
                return
            files |= self._files_of_others(temporary)
            write_manifest(temporary, CheckpointManifest(step=step, config=config, files=files))
            fsync_folder(temporary)
            publish(temporary, self.folder / step_folder(step))
            self.newest, self._failing_since = step, None
            self._prune()
        except (OSError, ValueError) as error:
            if rank != 0:
                with suppress(OSError):  # on a full disk the file may stay empty
                    (temporary / f"rank-{rank}.failed").write_text(cause_of(error))
                return
            shutil.rmtree(temporary, ignore_errors=True)
            self._failed(step, cause_of(error))

    def _files_of_others(self, temporary: Path) -> dict[str, StoredFile]:
        """Waits for the other ranks' lists and merges them."""
        deadline, files = time.monotonic() + PATIENCE, {}
        for rank in sorted({ranks[0] for ranks in self.placement.assignment} - {0}):
            listed, failed = temporary / f"rank-{rank}.json", temporary / f"rank-{rank}.failed"
            while not listed.exists():
                if failed.exists():
                    raise OSError(f"rank {rank}: {failed.read_text() or 'cannot write its files'}")
                if time.monotonic() > deadline:
                    raise OSError(f"no files from rank {rank} after {PATIENCE:.0f} s (is {self.folder} shared?)")
                time.sleep(0.02)
            files |= _FILES.validate_json(listed.read_bytes())
            listed.unlink()
        return files

    def _prune(self) -> None:
        older, every = [step for step in self.steps() if step <= self.newest], self.config.keep_every
        for step in older[: -self.config.keep]:
            if not every or step % every:
                shutil.rmtree(self.folder / step_folder(step), ignore_errors=True)

    def _remove_leftovers(self, but: Path | None = None) -> None:
        for path in set(self.folder.glob("step-*.tmp")) - {but}:
            shutil.rmtree(path, ignore_errors=True)
