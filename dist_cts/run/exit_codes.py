"""Exit codes; turns the errors of a command into one line on stderr and an exit code for schedulers."""

import faulthandler
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from dist_cts.errors import RunError, UnreachableError, out_of_memory

DONE, ERROR, USAGE, STOPPED = 0, 1, 2, 75  # 75: stopped with a checkpoint; run the same command to resume
TORCHRUN_SECONDS = 5.0  # after which a torchrun that watches a failed rank has ended the others

AGENT = os.getppid()  # torchrun, if it started this process; later the parent may be whatever adopted an orphan


def finish(command: Callable[[], int]) -> int:
    """Runs `command` and returns its exit code; an error is printed as one line on stderr.

    ValueError and FileNotFoundError (invalid usage or config) return 2; RunError, OSError and ImportError return 1.
    Only one rank prints: `speaker` of a RunError, otherwise rank 0.
    """
    speaker, unreachable = 0, False
    faulthandler.enable(2)  # prints a traceback on SIGSEGV or SIGBUS, which raise no exception
    try:
        return command()
    except (ValueError, FileNotFoundError) as error:
        code, text = USAGE, str(error)
    except RunError as error:
        code, text, speaker = ERROR, str(error), error.speaker
        unreachable = isinstance(error, UnreachableError)
        if error.unexpected and int(os.environ.get("RANK", 0)) == speaker:
            traceback.print_exception(error.__cause__)
    except (OSError, ImportError) as error:
        code, text = ERROR, str(error)
    except KeyboardInterrupt:
        code, text = ERROR, "interrupted; run the same command to resume from the newest checkpoint"
    except Exception as error:
        if not (text := out_of_memory(error)):
            raise
        code, speaker = ERROR, int(os.environ.get("RANK", 0))
        text = f"rank {speaker}: {text}"
    report(text, speaker)
    restarts, of = (int(os.environ.get(f"TORCHELASTIC_{key}", 0)) for key in ("RESTART_COUNT", "MAX_RESTARTS"))
    if unreachable and restarts >= of:
        # On a host that is cut off, torchrun's calls to its store block until the kernel closes the connection, after
        # 16 minutes on Linux; no option bounds them and SIGTERM is not handled. With restarts left, the network may
        # come back.
        _signal_agent(signal.SIGKILL)
    return code


def report(text: str, speaker: int = 0) -> None:
    """Prints an error on rank `speaker`; the other ranks are silent.

    torchrun ends with a report of its own. It quotes our line there, as the root cause, if it finds it in the file that
    it named to the rank. The other ranks wait until torchrun ends them, or they would be listed as failures too.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if int(os.environ.get("RANK", 0)) == speaker:
        print(f"error: {text}", file=sys.stderr, flush=True)
        if file:
            details = {"py_callstack": text, "timestamp": str(int(time.time()))}
            with suppress(OSError):
                Path(file).write_text(json.dumps({"message": {"message": text, "extraInfo": details}}))
    elif file and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        signal.signal(signal.SIGTERM, lambda *_: os._exit(DONE))
        time.sleep(TORCHRUN_SECONDS)


def _signal_agent(number: signal.Signals) -> None:
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ["LOCAL_RANK"] == "0" and os.getppid() == AGENT:
        os.kill(AGENT, number)


def exit_process(code: int) -> NoReturn:
    """Exits without Python's shutdown; all files must be closed.

    gloo's threads outlive the interpreter and can abort during shutdown, so that a finished rank looks crashed. After a
    requested stop or a usage error, torchrun --max-restarts is terminated too, because it would restart the run.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    if code in (STOPPED, USAGE) and restarts:
        _signal_agent(signal.SIGTERM)
    os._exit(code)
