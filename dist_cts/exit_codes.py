"""How a command of launch/ ends: one clear line for a mistake, and an exit code that a scheduler understands."""

import os
import sys
from collections.abc import Callable

DONE, ERROR, USAGE, STOPPED = 0, 1, 2, 75  # 75: a checkpoint is written, start the same command again


class RunError(RuntimeError):
    """A run that cannot go on; every rank raises it at the same step, with the same text."""


def finish(command: Callable[[], int]) -> int:
    """Runs `command` and gives its exit code; a user's mistake or a lost peer becomes a line on stderr.

    ValueError and FileNotFoundError (the command cannot run as asked) give 2, RunError and OSError (it failed) 1.
    Mistakes that all ranks share are printed by rank 0 alone.
    """
    rank = os.environ.get("RANK", "0")
    try:
        return command()
    except (ValueError, FileNotFoundError) as error:
        code, text = USAGE, str(error)
    except (RunError, OSError, ImportError) as error:
        code, text = ERROR, str(error)
    except KeyboardInterrupt:
        code, text = ERROR, "interrupted at once; the newest checkpoint is what a restart goes on from"
    if rank == "0":
        print(f"error: {text}", file=sys.stderr, flush=True)
    return code
