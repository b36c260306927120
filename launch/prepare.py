"""Prepares data sets for training: from raw downloads to .beton files, a folder for each task.

    python launch/prepare.py DATASET --root RAW --out BETON_DIR [--split-classes a:b] [--pixels N] [--limit N]
    python launch/prepare.py --suite demo --out BETON_DIR

Exit codes: 0 done, 1 error, 2 bad usage.
"""

import argparse
import os
import sys
import time
from pathlib import Path

from pydantic import ValidationError

from dist_cts.data import catalog
from dist_cts.data.beton import Manifest
from dist_cts.data.prepare import OptionError, Options, prepare, task_name


def class_range(text: str) -> tuple[int, int]:
    first, _, stop = text.partition(":")
    if not (first.isdecimal() and stop.isdecimal() and int(first) < int(stop)):
        raise argparse.ArgumentTypeError(f"{text!r} is no range a:b with a < b, such as 0:100")
    return int(first), int(stop)


def folder_name(text: str) -> str:
    if not text.strip(".") or set(text) & set("/\\\0"):
        raise argparse.ArgumentTypeError(f"{text!r} is no name for a folder")
    return text


def parser() -> argparse.ArgumentParser:
    width = max(map(len, catalog.CATALOG))
    lines = [f"  {entry.name:<{width}}  {entry.where}" for entry in catalog.CATALOG.values()]
    lines.append(f"  {'embedded:TASK':<{width}}  a task that dist_cts draws itself; --suite demo is all of them")
    parser = argparse.ArgumentParser(
        prog="prepare.py",
        usage="prepare.py (DATASET | --suite SUITE) [--root RAW] --out BETON_DIR [options]; see --help",
        description="Make a task (train.beton, test.beton and their manifests) of a data set. "
        "What is already there and intact is left alone.",
        epilog="\n".join(["data sets, and where to get them:", *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("dataset", nargs="?", metavar="DATASET", help="one of the data sets below")
    add("--suite", help="prepare all data sets of a suite instead: demo")
    add("--root", type=Path, help="the folder with the raw data, in their original layout")
    add("--out", type=Path, required=True, help="where the task's folder goes")
    add("--name", type=folder_name, help="that folder's name (default: the data set and its class range)")
    add(
        "--split-classes", type=class_range, metavar="a:b", help="only classes a to b-1, counted from 0: 0:100, 100:200"
    )
    add("--pixels", type=int, help="side that images are resized to (default: the data set's own)")
    add("--limit", type=int, help="at most so many train images, a random choice with equal classes")
    add("--test-fraction", type=float, default=0.2, help="of each class, if the data set has no split (default 0.2)")
    add("--seed", type=int, default=0, help="of that split and of the limit (default 0)")
    add("--mode", choices=("raw", "jpg"), default="raw", help="how images are stored (default raw: exact, faster)")
    add("--on-error", choices=("stop", "skip"), default="stop", help="images that do not decode (default stop)")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), help="threads (default: the cores there are)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    usage = parser()
    args = usage.parse_args(arguments)
    if bool(args.dataset) == bool(args.suite):
        usage.error("name one data set or one --suite")
    try:
        entries = catalog.suite(args.suite) if args.suite else [catalog.entry(args.dataset)]
        options = Options(**{key: getattr(args, key) for key in Options.model_fields})
    except ValidationError as error:
        fault = error.errors()[0]
        usage.error(f"argument --{str(fault['loc'][0]).replace('_', '-')}: {fault['msg']}, not {fault['input']}")
    except ValueError as fault:
        usage.error(str(fault))
    if args.workers < 1:
        usage.error(f"argument --workers: at least 1, not {args.workers}")
    if args.root is None and any(entry.needs_root for entry in entries):
        usage.error(f"{args.dataset or args.suite} needs --root, the folder with the raw data")
    if args.name and args.suite:
        usage.error("--name is for one data set, not for a suite")

    for entry in entries:
        folder = args.out / (args.name or task_name(entry, args.root, options))
        start = time.monotonic()
        try:
            train, test = prepare(entry, args.root, folder, options, args.workers, args.on_error)
        except (OptionError, FileNotFoundError) as fault:
            usage.error(f"{entry.name}: {fault}")
        except (ValueError, OSError, ImportError) as fault:
            print(f"error: {fault}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print(f"error: stopped; {folder} is not complete", file=sys.stderr)
            return 1
        whole = options.split_classes is None and options.limit is None
        print(summary(entry, folder, train, test, time.monotonic() - start, whole), flush=True)
    return 0


def summary(entry: catalog.Entry, folder: Path, train: Manifest, test: Manifest, seconds: float, whole: bool) -> str:
    line = (
        f"{folder}: {train.count:,} train and {test.count:,} test images, {train.classes} classes, "
        f"{train.pixels} x {train.pixels} {'RGB' if train.channels == 3 else 'grey'}, {train.mode}, "
        f"{(train.bytes + test.bytes) / 1e6:,.0f} MB, {seconds:.1f} s"
    )
    skipped = len(train.skipped) + len(test.skipped)
    if skipped:
        line += f"; left out {skipped} that do not decode: `skipped` in the manifests names them"
    if whole and entry.counts and sum(entry.counts) != train.count + test.count + skipped:
        line += f"; the whole data set has {entry.counts[0]:,} and {entry.counts[1]:,}"
    return line


if __name__ == "__main__":
    sys.exit(main())
