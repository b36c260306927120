"""The demo needs no preparation: its first command draws the embedded tasks that it uses."""

import fcntl
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from dist_cts.config import CONFIGS
from dist_cts.errors import RunError
from dist_cts.yaml_file import read_yaml

DEMO = CONFIGS / "demo.yaml"
FILES = (DEMO, CONFIGS / "demo_meta_test.yaml")


def draw_missing(file: Path, root: Path, names: Sequence[str]) -> None:
    """Draws the embedded tasks among `names` that `root` lacks, if `file` is the demo's or a shipped one based on it.

    Local rank 0 of every node draws, under a lock because nodes can share a disk. The other ranks wait for the files:
    they have not joined the process group, so no collective can time out. If local rank 0 fails, torchrun ends them.

    Raises:
        RunError: the tasks cannot be written.
    """
    if not _missing(root, names) or not _of_the_demo(file.resolve()):
        return
    from dist_cts.data.prepare import catalog, embedded  # late, as fonts and samples take a second
    from dist_cts.data.prepare.task import Options, prepare

    names = [name for name in names if name in embedded.TASKS]
    if int(os.environ.get("LOCAL_RANK", 0)) > 0:
        while _missing(root, names):
            time.sleep(0.1)
        return
    rank = int(os.environ.get("RANK", 0))
    try:
        root.mkdir(parents=True, exist_ok=True)
        with (root / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for name in _missing(root, names):
                print(f"drawing task {root / name}", file=sys.stderr, flush=True)
                prepare(catalog.entry(catalog.EMBEDDED + name), None, root / name, Options())
    except (ValueError, OSError) as error:
        raise RunError(f"cannot draw the demo's tasks into {root}: {error}", speaker=rank) from error


def _of_the_demo(file: Path) -> bool:
    return file in FILES or (
        file.is_relative_to(CONFIGS) and (file.parent / read_yaml(file).get("base", "")).resolve() in FILES
    )


def _missing(root: Path, names: Sequence[str]) -> list[str]:
    return [name for name in names if not (root / name / "test.json").exists()]  # the file that is written last
