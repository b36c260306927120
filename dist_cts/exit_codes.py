"""How a command of launch/ ends: one clear line for a mistake, and an exit code that a scheduler understands."""

import os
import sys
from collections.abc import Callable
from typing import NoReturn

DONE, ERROR, USAGE, STOPPED = 0, 1, 2, 75  # 75: a checkpoint is written, start the same command again


class RunError(RuntimeError):
    """A run that cannot go on; every rank raises it, with the same text."""


class RankError(RunError):
    """What ends the run on one rank alone; the others then lose contact with it."""


def finish(command: Callable[[], int]) -> int:
    """Runs `command` and gives its exit code; a mistake or a failure becomes a line on stderr.

    ValueError and FileNotFoundError (the command cannot run as asked) give 2, RunError, OSError and ImportError (it
    failed) 1. What all ranks share is printed by rank 0 alone, a RankError by its rank.
    """
    rank = os.environ.get("RANK", "0")
    speaks = rank == "0"
    try:
        return command()
    except (ValueError, FileNotFoundError) as error:
        code, text = USAGE, str(error)
    except RankError as error:
        code, text, speaks = ERROR, f"rank {rank}: {error}", True
    except (RunError, OSError, ImportError) as error:
        code, text = ERROR, str(error)
    except KeyboardInterrupt:
        code, text = ERROR, "interrupted at once; the same command goes on from the newest checkpoint"
    if speaks:
        print(f"error: {text}", file=sys.stderr, flush=True)
    return code


def leave(code: int) -> NoReturn:
    """Ends the process at once; all files must be closed.

    gloo's threads outlive the interpreter and at times abort an orderly exit: a finished rank would look like a crash.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
