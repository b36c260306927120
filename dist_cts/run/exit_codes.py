"""How a command of launch/ ends: one clear line for a mistake, and an exit code that a scheduler understands."""

import faulthandler
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from dist_cts.errors import RunError

DONE, ERROR, USAGE, STOPPED = 0, 1, 2, 75  # 75: a checkpoint is written, start the same command again


def finish(command: Callable[[], int]) -> int:
    """Runs `command` and gives its exit code; a mistake or a failure becomes a line on stderr.

    ValueError and FileNotFoundError (the command cannot run as asked) give 2, RunError, OSError and ImportError (it
    failed) 1. What all ranks share is printed by rank 0 alone, or by the rank that a RunError names.
    """
    speaker = 0
    faulthandler.enable(2)  # says where a crash was (SIGSEGV, SIGBUS), which ends the process without an exception
    try:
        return command()
    except (ValueError, FileNotFoundError) as error:
        code, text = USAGE, str(error)
    except RunError as error:
        code, text, speaker = ERROR, str(error), error.speaker
    except (OSError, ImportError) as error:
        code, text = ERROR, str(error)
    except KeyboardInterrupt:
        code, text = ERROR, "interrupted at once; the same command goes on from the newest checkpoint"
    if int(os.environ.get("RANK", 0)) == speaker:
        print(f"error: {text}", file=sys.stderr, flush=True)
    return code


def exit_process(code: int) -> NoReturn:
    """Ends the process at once; all files must be closed.

    gloo's threads outlive the interpreter and at times abort an orderly exit: a finished rank would look like a crash.
    A torchrun that restarts what fails is ended too where that would not help: after a stop on request, a bad config.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    if code in (STOPPED, USAGE) and restarts and os.environ["LOCAL_RANK"] == "0":
        os.kill(os.getppid(), signal.SIGTERM)
    os._exit(code)
