"""Meta-trains phi; see --help."""

import argparse
import sys
from pathlib import Path

EPILOG = """\
examples:
  torchrun --standalone --nproc_per_node=8 launch/train.py --config configs/demo.yaml
  torchrun --standalone --nproc_per_node=4 launch/train.py --config configs/demo.yaml algorithm=reptile meta_lr=1
  python launch/train.py --config configs/demo.yaml run_dir=runs/alone          (all tasks in one process)

T tasks run on 1 .. T ranks or a multiple of T. The same command resumes a stopped run. Exit codes: 0 done, 75 stopped
on request with a checkpoint, 1 error, 2 bad usage or config. torchrun turns every code but 0 into 1; after 75 the file
RUN/stopped exists.

config keys and their defaults:
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Meta-train a shared initialization phi over many tasks, one task learner per rank.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, required=True, help="YAML file with what differs from the defaults")
    parser.add_argument("--fresh", action="store_true", help="start from scratch; the old run folder becomes NAME.1")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override a config key")
    if {"-h", "--help"} & set(sys.argv[1:] if arguments is None else arguments):
        from dist_cts import TrainConfig, config

        parser.epilog = EPILOG + "\n".join(config.describe(TrainConfig))
    args = parser.parse_intermixed_args(arguments)

    from dist_cts import TrainConfig, config, train  # late, as torch takes seconds: --help and typos answer at once
    from dist_cts.run.exit_codes import finish

    def command() -> int:
        settings = config.load(TrainConfig, args.config, args.overrides)
        return train(settings.with_run_dir(args.config), args.fresh)

    return finish(command)


if __name__ == "__main__":
    code = main()
    from dist_cts.run.exit_codes import exit_process

    exit_process(code)
