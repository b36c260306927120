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

from pydantic import Field, TypeAdapter
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
    step_folder,
    task_file,
    to_host,
    write_manifest,
    write_state,
)
from dist_cts.checkpoint.settings import MAY_DIFFER, config_difference, with_new_keys
from dist_cts.config import Config
from dist_cts.distributed.placement import Placement
from dist_cts.distributed.process_group import from_rank_0, gather, raise_on_all_ranks
from dist_cts.flat import load_named
from dist_cts.state import TrainState

PATIENCE = 300.0  # seconds that rank 0 waits for the other ranks' files
_FILES = TypeAdapter(dict[str, StoredFile])
log = logging.getLogger(__name__)


class CheckpointConfig(Config):
    """When to save and what to keep. A run also saves when it finishes or is asked to stop."""

    every_steps: int = Field(1000, ge=0, description="save a checkpoint every N steps; 0 disables")
    every_minutes: float = Field(0.0, ge=0, description="save a checkpoint every N minutes; 0 disables")
    keep: int = Field(2, ge=1, description="number of newest checkpoints to keep")
    keep_every: int = Field(0, ge=0, description="keep every N-step checkpoint permanently; 0 disables")


class _Report(NamedTuple):
    """State of each rank before a save; all ranks decide from the gathered reports."""

    busy: bool
    newest: int | None
    token: str


class CheckpointManager:
    """The checkpoints of one run. Every rank calls every method at the same step; only rank 0 warns.

    A save copies the state to the host; a thread on each rank writes it. The threads synchronize through files in a
    shared folder, not through collectives, which could interleave with those of training: each rank writes its files,
    then a list of them; rank 0 waits for all lists, writes the manifest and publishes the checkpoint by a rename.
    """

    def __init__(
        self, folder: Path, config: CheckpointConfig, placement: Placement, warn: Callable[[str], object] = log.warning
    ) -> None:
        """Creates `folder` and removes incomplete checkpoints; the caller holds the run's lock.

        Raises:
            OSError: the folder cannot be created.
        """
        self.folder, self.config, self.placement = folder, config, placement
        self.warn = warn if placement.rank == 0 else lambda text: None
        self.newest: int | None = None  # step of the newest valid checkpoint known to this rank
        self._thread: Thread | None = None
        self._copies: dict[str, dict[str, Tensor]] = {}  # reused: allocating costs more than copying
        self._saved_at, self._saved_step, self._next_look = time.monotonic(), 0, 0
        self._decision: tuple[int, bool] = (-1, False)  # the last step that `due` was called with, and its result
        with raise_on_all_ranks():
            if placement.rank == 0:
                folder.mkdir(parents=True, exist_ok=True)
                self._remove_leftovers()

    def steps(self) -> list[int]:
        """The steps that have a checkpoint folder, oldest first; only loading verifies them."""
        names = (re.fullmatch(r"step-(\d{8,})", path.name) for path in self.folder.iterdir())
        return sorted(int(name[1]) for name in names if name)

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due after `step`: the same answer on every rank and at every call."""
        if self._decision[0] != step:
            self._decision = step, self._decide(step)
        return self._decision[1]

    def _decide(self, step: int) -> bool:
        if any(period and step % period == 0 for period in (self.config.every_steps, self.config.keep_every)):
            return True
        if not self.config.every_minutes or step < self._next_look:
            return False
        # Rank 0's clock decides for all ranks. It is checked again halfway to the due time, at the speed so far.
        passed = time.monotonic() - self._saved_at
        left = 60 * self.config.every_minutes - passed
        ahead = int(left / 2 / passed * (step - self._saved_step))
        due, self._next_look = from_rank_0((left <= 0, step + max(1, ahead)))
        return due

    def save(self, state: TrainState, config: Config, wait: bool = False) -> bool:
        """Starts saving the state and the run's config. Training may continue when this returns.

        A failure (full disk, non-finite tensor) or an earlier save still running is reported as a warning; the last
        valid checkpoint stays. `wait` waits for an earlier save and for this one: for the end of a run.

        Returns:
            Whether the save has started; with `wait`, whether the step has a valid checkpoint. The same on every rank.
        """
        if wait:
            self.wait()
        step, learners = state.progress.step, state.learners
        self._saved_at, self._saved_step, self._next_look = time.monotonic(), step, step + 1
        states: dict[str, State] = {task_file(learner.name): learner.state_dict() for learner in learners}
        layouts = {task_file(learner.name): learner.flat.layout.fingerprint() for learner in learners}
        contents = {task_file(learner.name): learner.data_fingerprint for learner in learners}
        ranks = gather(_Report(self._busy(), self.newest, uuid.uuid4().hex[:8]))
        if ranks[0].newest == step:
            return True
        if any(rank.busy for rank in ranks):
            self.warn(f"step {step}: checkpoint skipped, an earlier one is still being written")
            return False
        if self.placement.rank == 0:
            states[PHI], layouts[PHI] = state.layout.views(state.phi), state.fingerprint
            if outer := state.outer_state():
                states[OUTER], layouts[OUTER] = outer, layouts[PHI]
        if self.placement.contributes:  # the ranks of a data group hold the same bits: only the first saves
            self._copies = {name: to_host(tensors, self._copies.get(name, {})) for name, tensors in states.items()}
            # Named by rank 0's token, so that files of an earlier attempt at this step cannot get in.
            temporary = self.folder / f"{step_folder(step)}.{ranks[0].token}.tmp"
            values = config.model_dump(mode="json")
            # A daemon: a failing rank must not wait for the files of ranks that may have failed before it.
            self._thread = Thread(
                target=self._write, args=(temporary, step, self._copies, layouts, contents, values), daemon=True
            )
            self._thread.start()
        return self.wait() == step if wait else True

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
                tensors = states[task_file(learner.name)]
                learner.load_state_dict({key: value.to(state.phi.device) for key, value in tensors.items()})
                learner.seek(step)
            state.progress.step = self.newest = self._saved_step = step
            if self.placement.rank == 0:
                self._set_aside(damaged)
            return step
        if damaged:
            raise ValueError(f"{self.folder}: no valid checkpoint among {len(damaged)}; restore one or pass --fresh")
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
            self.newest = step
            self._prune()
        except (OSError, ValueError) as error:
            if rank != 0:
                with suppress(OSError):  # on a full disk the file may stay empty
                    (temporary / f"rank-{rank}.failed").write_text(str(error))
                return
            shutil.rmtree(temporary, ignore_errors=True)
            last = "no valid one yet" if self.newest is None else f"the latest valid one is at step {self.newest}"
            self.warn(f"step {step}: checkpoint failed: {error}; training continues, {last}")

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
        older = [step for step in self.steps() if step <= self.newest]
        for step in older[: -self.config.keep]:
            if not (self.config.keep_every and step % self.config.keep_every == 0):
                shutil.rmtree(self.folder / step_folder(step), ignore_errors=True)

    def _remove_leftovers(self, but: Path | None = None) -> None:
        for path in set(self.folder.glob("step-*.tmp")) - {but}:
            shutil.rmtree(path, ignore_errors=True)

    def _set_aside(self, damaged: Sequence[Path]) -> None:
        for path in damaged:
            shutil.rmtree(path.with_suffix(".damaged"), ignore_errors=True)
            with suppress(OSError):  # not writable: the next save reports it
                path.rename(path.with_suffix(".damaged"))
