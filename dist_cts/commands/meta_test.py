"""`dist-cts meta-test`: adapts initializations to target tasks."""

import argparse
import sys

from dist_cts import config
from dist_cts.commands import IMPORT
from dist_cts.commands.demo import draw_missing
from dist_cts.commands.parser import Parser
from dist_cts.run.exit_codes import finish

EPILOG = """\
examples:
  dist-cts meta-test --config demo_meta_test --phi runs/demo/phi.safetensors
  dist-cts meta-test --config mine.yaml --phi cts=runs/a/phi.safetensors --phi reptile=runs/b/phi.safetensors seeds=5
  torchrun --standalone --nproc_per_node=2 -m dist_cts meta-test ...            (the jobs are spread over the ranks)
  ... --phi cts=runs/a/snapshots                             (a curve along meta-training, one cts@STEP per snapshot)

In a checkout, launch/meta_test.py is the same command.
The same command resumes an interrupted meta-test. Exit codes: 0 done, 1 error, 2 bad usage or config.

config keys and their defaults:
"""
PHI = """an initialization, repeatable: a .safetensors or .pth file, a run's folder of snapshots, or torchvision's
ResNet18_Weights.IMAGENET1K_V1; NAME appears in the tables (default: the run folder's name)"""


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        prog="dist-cts meta-test",
        description="Adapt phi, and random initialization, to target tasks; report test accuracy over several seeds.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="PATH|NAME", required=True, help=config.HELP)
    parser.add_argument("--phi", action="append", default=[], metavar="[NAME=]SOURCE", help=PHI)
    parser.add_argument("--import", action="append", default=[], dest="imports", metavar="MODULE", help=IMPORT)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override a config key")
    if {"-h", "--help"} & set(sys.argv[1:] if arguments is None else arguments):
        from dist_cts import MetaTestConfig

        parser.epilog = EPILOG + "\n".join(config.describe(MetaTestConfig))
    args = parser.parse_intermixed_args(arguments)

    def command() -> int:
        file = config.find(args.config)
        from dist_cts import MetaTestConfig, meta_test  # late, as torch takes seconds: typos answer at once
        from dist_cts.run.imports import import_modules

        import_modules(args.imports)
        settings = config.load(MetaTestConfig, file, args.overrides)
        draw_missing(file, settings.data.root, settings.target_names)
        with config.blamed(file, args.overrides):
            return meta_test(settings, args.phi, name=file.stem)

    return finish(command)
