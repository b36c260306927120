"""Meta-tests initializations on target tasks; see --help."""

import argparse
import sys
from pathlib import Path

EPILOG = """\
examples:
  python launch/meta_test.py --config configs/demo_meta_test.yaml --phi runs/demo/phi.safetensors
  python launch/meta_test.py --config configs/demo_meta_test.yaml --phi cts=runs/a/phi.safetensors \\
    --phi reptile=runs/b/phi.safetensors seeds=5
  torchrun --standalone --nproc_per_node=2 launch/meta_test.py ...              (the jobs are spread over the ranks)
  ... --phi cts=runs/a/snapshots                             (a curve along meta-training, one cts@STEP per snapshot)

The same command resumes an interrupted meta-test. Exit codes: 0 done, 1 error, 2 bad usage or config.

config keys and their defaults:
"""
PHI = """an initialization, repeatable: a .safetensors or .pth file, a run's folder of snapshots, or torchvision's
ResNet18_Weights.IMAGENET1K_V1; NAME appears in the tables (default: the run folder's name)"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="meta_test.py",
        description="Adapt phi, and random initialization, to target tasks; report test accuracy over several seeds.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, required=True, help="YAML file with what differs from the defaults")
    parser.add_argument("--phi", action="append", default=[], metavar="[NAME=]SOURCE", help=PHI)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override a config key")
    if {"-h", "--help"} & set(sys.argv[1:] if arguments is None else arguments):
        from dist_cts import MetaTestConfig, config

        parser.epilog = EPILOG + "\n".join(config.describe(MetaTestConfig))
    args = parser.parse_intermixed_args(arguments)

    from dist_cts import MetaTestConfig, config, meta_test  # late, as torch takes seconds
    from dist_cts.run.exit_codes import finish

    def command() -> int:
        settings = config.load(MetaTestConfig, args.config, args.overrides)
        return meta_test(settings, args.phi, name=args.config.stem)

    return finish(command)


if __name__ == "__main__":
    code = main()
    from dist_cts.run.exit_codes import exit_process

    exit_process(code)
