"""Exit codes; turns the errors of a command into one line on stderr and an exit code for schedulers."""

import faulthandler
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from dist_cts.errors import RunError

DONE, ERROR, USAGE, STOPPED = 0, 1, 2, 75  # 75: stopped with a checkpoint; run the same command to resume


def finish(command: Callable[[], int]) -> int:
    """Runs `command` and returns its exit code; an error is printed as one line on stderr.

    ValueError and FileNotFoundError (invalid usage or config) return 2; RunError, OSError and ImportError return 1.
    Only one rank prints: `speaker` of a RunError, otherwise rank 0.
    """
    speaker = 0
    faulthandler.enable(2)  # prints a traceback on SIGSEGV or SIGBUS, which raise no exception
    try:
        return command()
    except (ValueError, FileNotFoundError) as error:
        code, text = USAGE, str(error)
    except RunError as error:
        code, text, speaker = ERROR, str(error), error.speaker
    except (OSError, ImportError) as error:
        code, text = ERROR, str(error)
    except KeyboardInterrupt:
        code, text = ERROR, "interrupted; run the same command to resume from the newest checkpoint"
    if int(os.environ.get("RANK", 0)) == speaker:
        print(f"error: {text}", file=sys.stderr, flush=True)
    return code


def exit_process(code: int) -> NoReturn:
    """Exits without Python's shutdown; all files must be closed.

    gloo's threads outlive the interpreter and can abort during shutdown, so that a finished rank looks crashed. After a
    requested stop or a usage error, torchrun --max-restarts is terminated too, because it would restart the run.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    if code in (STOPPED, USAGE) and restarts and os.environ["LOCAL_RANK"] == "0":
        os.kill(os.getppid(), signal.SIGTERM)
    os._exit(code)
