"""`dist-cts train`: meta-trains phi."""

import argparse
import os
import sys

from dist_cts import config
from dist_cts.commands import IMPORT
from dist_cts.commands.demo import DEMO, draw_missing
from dist_cts.commands.parser import Parser
from dist_cts.run.exit_codes import finish

EPILOG = """\
examples:
  torchrun --standalone --nproc_per_node=8 -m dist_cts train                     (the demo)
  torchrun --standalone --nproc_per_node=4 -m dist_cts train --config mine.yaml algorithm=reptile meta_lr=1
  dist-cts train --config paper/cts run_dir=runs/alone                           (all tasks in one process)

In a checkout, launch/train.py is the same command.

T tasks run on 1 .. T ranks or a multiple of T. The same command resumes a stopped run. Exit codes: 0 done, 75 stopped
on request with a checkpoint, 1 error, 2 bad usage or config. torchrun turns every code but 0 into 1; after 75 the file
RUN/stopped exists.

config keys and their defaults:
"""

CONFIG = f"{config.HELP}; default: the demo"


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        prog="dist-cts train",
        description="Meta-train a shared initialization phi over many tasks, one task learner per rank.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="PATH|NAME", help=CONFIG)
    parser.add_argument("--fresh", action="store_true", help="start from scratch; the old run folder becomes NAME.1")
    parser.add_argument("--import", action="append", default=[], dest="imports", metavar="MODULE", help=IMPORT)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override a config key")
    if {"-h", "--help"} & set(sys.argv[1:] if arguments is None else arguments):
        from dist_cts import TrainConfig

        parser.epilog = EPILOG + "\n".join(config.describe(TrainConfig))
    args = parser.parse_intermixed_args(arguments)

    def command() -> int:
        if args.config is None and os.environ.get("RANK", "0") == "0":
            print("no --config given: training the demo, 8 small tasks drawn by dist_cts", file=sys.stderr, flush=True)
        file = DEMO if args.config is None else config.find(args.config)
        from dist_cts import TrainConfig, train  # late, as torch takes seconds: typos answer at once
        from dist_cts.run.imports import import_modules

        import_modules(args.imports)
        settings = config.load(TrainConfig, file, args.overrides)
        draw_missing(file, settings.data.root, settings.task_names)
        with config.blamed(file, args.overrides):
            return train(settings.with_run_dir(file), args.fresh)

    return finish(command)
