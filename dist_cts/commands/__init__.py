"""The commands: `dist-cts NAME ...`, also as `python -m dist_cts NAME ...`; each one is a module of this package."""

import argparse
import importlib
import sys
from typing import NoReturn

from dist_cts.run.exit_codes import exit_process

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
        parser = argparse.ArgumentParser(
            prog="dist-cts",
            description="Distributed large-scale meta-learning with continual trajectory shifting.",
            epilog="Options: dist-cts COMMAND --help. On N ranks: torchrun --nproc_per_node=N -m dist_cts COMMAND",
        )
        commands = parser.add_subparsers(metavar="COMMAND", required=True)
        for name, help in COMMANDS.items():
            commands.add_parser(name, help=help)
        parser.parse_args(arguments)
    module = importlib.import_module(f"dist_cts.commands.{arguments[0].replace('-', '_')}")
    exit_process(module.main(arguments[1:]))
