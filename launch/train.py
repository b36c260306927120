"""Meta-trains phi; see --help."""

import argparse
import sys
from pathlib import Path

EPILOG = """\
examples:
  torchrun --standalone --nproc_per_node=8 launch/train.py --config configs/demo.yaml
  torchrun --standalone --nproc_per_node=4 launch/train.py --config configs/demo.yaml algorithm=reptile meta_lr=1
  python launch/train.py --config configs/demo.yaml run_dir=runs/alone          (all tasks in one process)

T tasks run on 1 .. T ranks or a multiple of T. The same command goes on where a run stopped. Exit codes: 0 done,
75 stopped on request with a checkpoint written, 1 error, 2 bad usage or config. torchrun makes 1 of every one but 0;
after 75 there is a file RUN/stopped.

config keys and their defaults:
"""


CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def default_run_dir(config: Path) -> Path:
    """runs/ and the config's path below configs/, as several folders there have a cts.yaml; elsewhere its name."""
    path = config.resolve()
    return Path("runs") / (path.relative_to(CONFIGS) if path.is_relative_to(CONFIGS) else Path(path.name)).with_suffix(
        ""
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Meta-train a shared initialization phi over many tasks, one task learner a rank.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, required=True, help="YAML file with what differs from the defaults")
    parser.add_argument("--fresh", action="store_true", help="start anew; what the run folder holds moves to NAME.1")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override a key of the config")
    if {"-h", "--help"} & set(sys.argv[1:] if arguments is None else arguments):
        from dist_cts import config
        from dist_cts.run.config import TrainConfig

        parser.epilog = EPILOG + "\n".join(config.describe(TrainConfig))
    args = parser.parse_intermixed_args(arguments)

    from dist_cts import config
    from dist_cts.run.config import TrainConfig
    from dist_cts.run.exit_codes import STOPPED, finish
    from dist_cts.run.train import train

    def command() -> int:
        settings = config.load(TrainConfig, args.config, args.overrides)
        run_dir = settings.run_dir or default_run_dir(args.config)
        stopped = run_dir / "stopped"  # exit code 75, for those who start torchrun and are given 1
        stopped.unlink(missing_ok=True)
        code = train(settings.model_copy(update={"run_dir": run_dir}), args.fresh)
        if code == STOPPED:
            stopped.touch()
        return code

    return finish(command)


if __name__ == "__main__":
    code = main()
    from dist_cts.run.exit_codes import exit_process

    exit_process(code)
