"""Checkpoints: when to save, what all ranks agree on, and how a run goes on; checkpoint_files.py has the files."""

import logging
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist
from pydantic import Field, TypeAdapter
from torch import Tensor

from dist_cts.checkpoint.files import (
    PHI,
    Manifest,
    State,
    StoredFile,
    fsync_folder,
    read_manifest,
    read_state,
    replace_file,
    step_folder,
    task_file,
    to_host,
    write_manifest,
    write_state,
)
from dist_cts.config import Config
from dist_cts.distributed.placement import Placement
from dist_cts.distributed.process_group import raise_on_all_ranks
from dist_cts.flat import FlatLayout, load_named
from dist_cts.learner import TaskLearner

PATIENCE = 300.0  # seconds that rank 0 waits for the other ranks' files
# What a resumed run may do otherwise than before: how long, where, what it says and keeps. A section means all of it.
MAY_DIFFER = (
    *("episodes", "run_dir", "device", "placement", "timeout_seconds", "max_minutes", "nonfinite", "loss_limit"),
    *("checkpoint", "log_every", "eval_every", "check_every", "snapshot_every", "data.root", "data.cache"),
    *("data.resident_limit_gib", "data.workers", "data.verify"),
)
_FILES = TypeAdapter(dict[str, StoredFile])
log = logging.getLogger(__name__)
T = TypeVar("T")


class CheckpointConfig(Config):
    """When to save, and what to keep. A run also saves when it ends or is asked to stop."""

    every_steps: int = Field(1000, ge=0, description="steps between two checkpoints; 0: none by steps")
    every_minutes: float = Field(0.0, ge=0, description="minutes between two checkpoints; 0: none by the clock")
    keep: int = Field(2, ge=1, description="newest checkpoints that are kept")
    keep_every: int = Field(0, ge=0, description="also save every so many steps, and keep these for good; 0: none")


class _Report(NamedTuple):
    """What a rank says before a save; all ranks decide from all reports."""

    busy: bool
    newest: int | None
    token: str


class Checkpoints:
    """The checkpoints of one run. Every rank calls every method, at the same step; rank 0 alone warns.

    A save copies the state to the host and leaves the rest to a thread of each rank. These agree through files (rank 0
    publishes once all parts lie in the folder), as a collective beside the training's own could be mistaken for one of
    them. So the ranks of several machines need one shared folder.
    """

    def __init__(
        self, folder: Path, config: CheckpointConfig, placement: Placement, warn: Callable[[str], object] = log.warning
    ) -> None:
        """Creates `folder` and removes half-made checkpoints from it; the caller holds the run's lock.

        Raises:
            OSError: the folder cannot be made.
        """
        self.folder, self.config, self.placement = folder, config, placement
        self.warn = warn if placement.rank == 0 else lambda text: None
        self.newest: int | None = None  # step of the newest good checkpoint, as far as this rank knows
        self._thread: Thread | None = None
        self._copies: dict[str, dict[str, Tensor]] = {}  # kept: new memory costs more time than the copying
        self._saved_at, self._saved_step, self._look = time.monotonic(), 0, 0
        with raise_on_all_ranks():
            if placement.rank == 0:
                folder.mkdir(parents=True, exist_ok=True)
                self._remove_leftovers()

    def steps(self) -> list[int]:
        """The steps that have a folder here, oldest first; whether each is whole is seen on loading it."""
        names = (re.fullmatch(r"step-(\d{8,})", path.name) for path in self.folder.iterdir())
        return sorted(int(name[1]) for name in names if name)

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be saved after `step`: the same answer on every rank."""
        if any(period and step % period == 0 for period in (self.config.every_steps, self.config.keep_every)):
            return True
        if not self.config.every_minutes or step < self._look:
            return False
        # Rank 0's clock decides, and says when to ask again: half-way at the pace so far, so it costs nothing.
        passed = time.monotonic() - self._saved_at
        left = 60 * self.config.every_minutes - passed
        ahead = int(left / 2 / passed * (step - self._saved_step))
        due, self._look = _from_rank_0((left <= 0, step + max(1, ahead)))
        return due

    def save(
        self,
        step: int,
        phi: Tensor,
        layout: FlatLayout,
        learners: Sequence[TaskLearner],
        config: Config,
        wait: bool = False,
    ) -> bool:
        """Saves the state after `step`: phi [N], the learners, the run's config. Training may go on when this returns.

        A failure (a full disk, a tensor that is not finite) becomes a warning and leaves the last good checkpoint, and
        so does an earlier save that still runs. `wait` waits for an earlier save and then for this one: for a run that
        ends.

        Returns:
            Whether the save has begun; with `wait`, whether `step` has a good checkpoint. The same on every rank.
        """
        if wait:
            self.wait()
        self._saved_at, self._saved_step, self._look = time.monotonic(), step, step + 1
        states: dict[str, State] = {task_file(learner.name): learner.state_dict() for learner in learners}
        layouts = {task_file(learner.name): learner.flat.layout.fingerprint() for learner in learners}
        ranks = _from_all(_Report(self._busy(), self.newest, uuid.uuid4().hex[:8]))
        if ranks[0].newest == step:
            return True
        if any(rank.busy for rank in ranks):
            self.warn(f"no checkpoint of step {step}: an earlier one is still being written")
            return False
        if self.placement.rank == 0:
            states[PHI], layouts[PHI] = layout.views(phi), layout.fingerprint()
        if self.placement.contributes:  # of a data group, whose ranks hold the same bits, the first saves
            self._copies = {name: to_host(state, self._copies.get(name, {})) for name, state in states.items()}
            # A name of its own, so that no file of an earlier attempt, or of a rank that hung there, can get in.
            temporary = self.folder / f"{step_folder(step)}.{ranks[0].token}.tmp"
            values = config.model_dump(mode="json")
            # A daemon: a rank that fails does not wait for the files of others, which may have failed before it.
            self._thread = Thread(
                target=self._write, args=(temporary, step, self._copies, layouts, values), daemon=True
            )
            self._thread.start()
        return self.wait() == step if wait else True

    def wait(self) -> int | None:
        """Ends a running save on all ranks; the step of the newest good checkpoint, None while there is none.

        The ranks keep in touch meanwhile: a slow disk is no lost rank, and a lost rank is not waited for.
        """
        while any(_from_all(self._busy())):
            if self._thread is not None:
                self._thread.join(0.1)
        self.newest = _from_rank_0(self.newest)
        return self.newest

    def load_newest(
        self,
        phi: Tensor,
        layout: FlatLayout,
        learners: Sequence[TaskLearner],
        config: Config,
        may_differ: Sequence[str] = MAY_DIFFER,
    ) -> int | None:
        """Restores phi [N] and the learners, but for their batches' position, from the newest checkpoint that is whole.

        One that any rank finds torn or altered is named in a warning and set aside as step-S.damaged, and the one
        before it is used.

        Returns:
            The step that training goes on after; None where there is no checkpoint.

        Raises:
            ValueError: there are checkpoints but none is whole; the run's config or a model does not fit.
        """
        damaged: list[Path] = []
        for step in reversed(_from_rank_0(self.steps() if self.placement.rank == 0 else [])):
            path, fault = self.folder / step_folder(step), None
            try:
                manifest = read_manifest(path)
                names = [PHI, *(task_file(learner.name) for learner in learners)]
                states = {name: read_state(path / name, manifest) for name in names}
            except (OSError, ValueError) as error:
                fault = str(error)
            faults = [fault for fault in _from_all(fault) if fault]
            if faults:
                self.warn(f"a damaged checkpoint is passed over: {faults[0]}")
                damaged.append(path)
                continue
            with raise_on_all_ranks():
                differing = config_difference(manifest.config, config.model_dump(mode="json"), may_differ)
                if differing:
                    raise ValueError(f"the config does not fit checkpoint {path}: {'; '.join(differing)}")
                layouts = {task_file(learner.name): learner.flat.layout for learner in learners}
                for name, now in {PHI: layout, **layouts}.items():
                    if manifest.files[name].layout != now.fingerprint():
                        raise ValueError(f"{path / name} is of a model with other tensors, shapes or strides")
            load_named(layout, phi, states[PHI])
            for learner in learners:
                state = states[task_file(learner.name)]
                learner.load_state_dict({key: value.to(phi.device) for key, value in state.items()})
            self.newest = self._saved_step = step
            if self.placement.rank == 0:
                self._set_aside(damaged)
            return step
        if damaged:
            raise ValueError(f"{self.folder}: none of {len(damaged)} checkpoints is whole; restore one, or start anew")
        return None

    def _busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _write(
        self, temporary: Path, step: int, states: dict[str, State], layouts: dict[str, str], config: dict[str, Any]
    ) -> None:
        """In the thread: this rank's files, then the list of them; on rank 0 the lists of all, and the rename."""
        rank = self.placement.rank
        try:
            if rank == 0:
                self._remove_leftovers(but=temporary)  # nobody writes to them: all earlier saves have ended everywhere
            temporary.mkdir(exist_ok=True)
            files = {name: write_state(temporary / name, state, layouts[name]) for name, state in states.items()}
            if rank != 0:
                fsync_folder(temporary)
                replace_file(temporary / f"rank-{rank}.json", _FILES.dump_json(files))
                return
            files |= self._files_of_others(temporary)
            write_manifest(temporary, Manifest(step=step, config=config, files=files))
            fsync_folder(temporary)
            temporary.rename(self.folder / step_folder(step))
            fsync_folder(self.folder)
            self.newest = step
            self._prune()
        except (OSError, ValueError) as error:
            if rank != 0:
                with suppress(OSError):  # on a full disk an empty file says enough
                    (temporary / f"rank-{rank}.failed").write_text(str(error))
                return
            shutil.rmtree(temporary, ignore_errors=True)
            last = "there is none yet" if self.newest is None else f"the last good one is of step {self.newest}"
            self.warn(f"no checkpoint of step {step}: {error}; training goes on, {last}")

    def _files_of_others(self, temporary: Path) -> dict[str, StoredFile]:
        """The other ranks' lists, as soon as each is there."""
        deadline, files = time.monotonic() + PATIENCE, {}
        for rank in sorted({ranks[0] for ranks in self.placement.assignment} - {0}):
            listed, failed = temporary / f"rank-{rank}.json", temporary / f"rank-{rank}.failed"
            while not listed.exists():
                if failed.exists():
                    raise OSError(f"rank {rank}: {failed.read_text() or 'its files could not be written'}")
                if time.monotonic() > deadline:
                    raise OSError(f"no files of rank {rank} after {PATIENCE:.0f} s (is {self.folder} a shared folder?)")
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
            with suppress(OSError):  # a folder that cannot be written to: the next save will say so
                path.rename(path.with_suffix(".damaged"))


def config_difference(saved: Mapping[str, Any], now: Mapping[str, Any], may_differ: Sequence[str] = ()) -> list[str]:
    """The keys with another value, such as `inner.lr was 0.05, is 0.1`, but for those keys or sections that may."""
    before, after = dict(_leaves(saved)), dict(_leaves(now))
    return [
        f"{key} was {before.get(key, 'not there')}, is {after.get(key, 'not there')}"
        for key in sorted(before.keys() | after.keys())
        if (key in before, before.get(key)) != (key in after, after.get(key))
        and not any(key == free or key.startswith(f"{free}.") for free in may_differ)
    ]


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _from_all(value: T) -> list[T]:
    values: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _from_rank_0(value: T) -> T:
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]
