"""The argument parser of all commands: a mistake is one line, and under torchrun rank 0 alone speaks."""

import argparse
import os
from typing import IO, NoReturn

from dist_cts.run.exit_codes import USAGE, report


class Parser(argparse.ArgumentParser):
    """Exits with code 2 on a mistake."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: -"):
            message += "; keys of the configuration are given as section.key=value, without dashes"
        report(f"{message}; see {self.prog} --help")
        raise SystemExit(USAGE)

    def _print_message(self, message: str, file: IO[str] | None = None) -> None:
        if os.environ.get("RANK", "0") == "0":
            super()._print_message(message, file)
