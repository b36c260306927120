"""Meta-tests starts on target tasks; see --help."""

import argparse
import sys
from pathlib import Path

EPILOG = """\
examples:
  python launch/meta_test.py --config configs/demo_meta_test.yaml --phi runs/demo/phi.safetensors
  python launch/meta_test.py --config configs/demo_meta_test.yaml --phi cts=runs/a/phi.safetensors \\
    --phi reptile=runs/b/phi.safetensors seeds=5
  torchrun --standalone --nproc_per_node=2 launch/meta_test.py ...              (the jobs spread over the ranks)
  ... --phi cts=runs/a/snapshots                                  (a curve along meta-training: starts cts@STEP)

An interrupted call goes on where it stopped. Exit codes: 0 done, 1 error, 2 bad usage or config.

config keys and their defaults:
"""


PHI = """a start, repeat for more: a .safetensors or .pth, a run's folder of snapshots, or torchvision's
ResNet18_Weights.IMAGENET1K_V1; NAME stands in the tables (default: the run folder's name)"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="meta_test.py",
        description="Adapt phi, and random initialization, to target tasks; report test accuracy over several seeds.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, required=True, help="YAML file with what differs from the defaults")
    parser.add_argument("--phi", action="append", default=[], metavar="[NAME=]SOURCE", help=PHI)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override a key of the config")
    if {"-h", "--help"} & set(sys.argv[1:] if arguments is None else arguments):
        from dist_cts import config, meta_test

        parser.epilog = EPILOG + "\n".join(config.describe(meta_test.MetaTestConfig))
    args = parser.parse_intermixed_args(arguments)

    from dist_cts import config, meta_test
    from dist_cts.checkpoint import phi as phi_files
    from dist_cts.run.exit_codes import finish

    def command() -> int:
        settings = config.load(meta_test.MetaTestConfig, args.config, args.overrides)
        starts = phi_files.named_starts(args.phi)
        files = [path for path in map(Path, starts.values()) if path.is_file()]
        beside = phi_files.run_folder(files[0]) / "meta_test" if files else Path("runs") / args.config.stem
        return meta_test.meta_test(settings.model_copy(update={"out": settings.out or beside}), starts)

    return finish(command)


if __name__ == "__main__":
    code = main()
    from dist_cts.run.exit_codes import exit_process

    exit_process(code)
