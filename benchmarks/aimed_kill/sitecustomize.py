"""Imported by Python at start-up if this folder is in PYTHONPATH: kills a rank of torchrun at a chosen file operation.

The file that AIM names holds {"rank": 0, "pattern": REGEX, "after": N}: that rank gets SIGKILL at its N-th operation on
a file after the first one whose path matches; an empty pattern counts imports instead. The file is removed first: an
aim kills once.
"""

import json
import os
import re
import signal
import sys
import threading

OPERATIONS = ("open", "os.", "shutil.")
inside, left = threading.local(), None


def watch(event: str, args: tuple) -> None:
    """Counts down from the matching operation on; the aim may appear or be withdrawn at any time."""
    global left
    if getattr(inside, "hook", False) or not (event == "import" or event.startswith(OPERATIONS)):
        return
    inside.hook = True
    try:
        if not os.path.exists(os.environ["AIM"]):
            left = None
            return
        with open(os.environ["AIM"]) as file:
            aim = json.load(file)
        if aim["rank"] != int(os.environ["RANK"]) or (event == "import") != (aim["pattern"] == ""):
            return
        if left is None and re.search(aim["pattern"], " ".join(str(arg) for arg in args[:2])):
            left = aim["after"]
        elif left is not None:
            left -= 1
        if left == 0:
            os.remove(os.environ["AIM"])
            os.kill(os.getpid(), signal.SIGKILL)
    finally:
        inside.hook = False


if "AIM" in os.environ and "RANK" in os.environ:
    sys.addaudithook(watch)
