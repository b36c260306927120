"""The commands: `dist-cts NAME ...`, also as `python -m dist_cts NAME ...`; each one is a module of this package."""

import difflib
import importlib
import sys
from typing import NoReturn

from dist_cts.commands.parser import Parser
from dist_cts.run.exit_codes import USAGE, exit_process, report

COMMANDS = {
    "prepare": "make tasks from datasets",
    "train": "meta-train phi over many tasks, alone or under torchrun",
    "meta-test": "adapt phi to unseen tasks and report test accuracy",
    "synthetic": "run a method on the paper's synthetic tasks",
    "plot": "draw the training curves of runs",
}
IMPORT = """a module, or the path of a .py file, that registers models, losses, methods or datasets of your own;
repeatable (docs/extending.md)"""


def main(arguments: list[str] | None = None) -> NoReturn:
    """Runs the command that the first argument names, with the others, and exits with its code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] not in COMMANDS:
        parser = Parser(
            prog="dist-cts",
            description="Distributed large-scale meta-learning with continual trajectory shifting.",
            epilog="Options: dist-cts COMMAND --help. On N ranks: torchrun --nproc_per_node=N -m dist_cts COMMAND",
        )
        commands = parser.add_subparsers(metavar="COMMAND", required=True)
        for name, help in COMMANDS.items():
            commands.add_parser(name, help=help)
        if arguments and not arguments[0].startswith("-"):
            near = difflib.get_close_matches(arguments[0], COMMANDS, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}? " if near else ""
            report(f"unknown command {arguments[0]!r}; {hint}commands: {', '.join(COMMANDS)}")
            exit_process(USAGE)
        parser.parse_args(arguments)
    module = importlib.import_module(f"dist_cts.commands.{arguments[0].replace('-', '_')}")
    try:
        code = module.main(arguments[1:])
    except SystemExit as usage:  # of argparse: --help, or a mistake
        code = usage.code or 0
    exit_process(code)
