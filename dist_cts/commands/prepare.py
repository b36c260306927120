"""`dist-cts prepare`: converts raw downloads to .beton files, one folder per task.

    dist-cts prepare DATASET --root RAW --out BETON_DIR [--split-classes a:b] [--pixels N] [--limit N]
    dist-cts prepare --suite paper-8 --root RAW --out BETON_DIR
    dist-cts prepare list
    dist-cts prepare verify BETON_DIR ...
    dist-cts prepare show BETON_DIR/TASK/train.beton --to sheet.png

Exit codes: 0 done, 1 error, 2 bad usage.
"""

import argparse
import os
import sys
import time
from pathlib import Path

from pydantic import ValidationError

from dist_cts.commands.parser import Parser
from dist_cts.config_faults import words
from dist_cts.data import beton
from dist_cts.data.manifest import Manifest
from dist_cts.data.prepare import catalog, contact_sheet, suites
from dist_cts.data.prepare.archives import NotThere
from dist_cts.data.prepare.task import RAW_UP_TO, OptionError, Options, prepare, task_name


def class_range(text: str) -> tuple[int, int]:
    first, _, stop = text.partition(":")
    if not (first.isdecimal() and stop.isdecimal() and int(first) < int(stop)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a range a:b with a < b, such as 0:100")
    return int(first), int(stop)


def folder_name(text: str) -> str:
    if not text.strip(".") or set(text) & set("/\\\0"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a valid folder name")
    return text


def parser() -> Parser:
    parser = Parser(
        prog="dist-cts prepare",
        usage="dist-cts prepare (DATASET | --suite SUITE) [--root RAW] --out BETON_DIR [options]; see --help",
        description="Prepare a dataset as a task: train.beton, test.beton and their manifests. "
        "A task that is already prepared and intact is left untouched. Other commands: `dist-cts prepare list`, "
        "`dist-cts prepare verify BETON_DIR ...`, `dist-cts prepare show TASK/train.beton --to sheet.png`.",
        epilog="\n".join(["datasets and their sources (details: `dist-cts prepare list`):", *places()]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("dataset", nargs="?", metavar="DATASET", help="one of the datasets below")
    add("--suite", help=f"prepare several tasks: {', '.join(suites.NAMES)}, or a YAML file with a list of tasks")
    add("--root", type=Path, help="raw data in their original layout; for a suite, one subfolder per dataset")
    add("--download", action="store_true", help="first download the raw data into ROOT, where torchvision can")
    add("--out", type=Path, required=True, help="output folder, with one subfolder per task")
    add("--name", type=folder_name, help="name of the task (default: dataset and class range)")
    add("--split-classes", type=class_range, metavar="a:b", help="use only classes a to b-1, counted from 0")
    add("--pixels", type=int, help="resize images to N x N (default: depends on the dataset)")
    add("--limit", type=int, help="class-balanced random subset of N train images")
    add("--test-fraction", type=float, help="test share per class, for datasets without a test split (default: 0.2)")
    add("--seed", type=int, default=0, help="random seed of the test split and the limit (default: 0)")
    add("--mode", choices=("raw", "jpg"), help=f"image storage (default: raw up to {RAW_UP_TO} px, jpg above)")
    add(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="if an image cannot be decoded: stop, or skip it and list it in the manifest (default: stop)",
    )
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), help="threads (default: number of cores)")
    return parser


def places() -> list[str]:
    width = max(map(len, catalog.CATALOG))
    lines = [f"  {entry.name:<{width}}  {entry.where}" for entry in catalog.CATALOG.values()]
    return [*lines, f"  {'embedded:TASK':<{width}}  a task drawn by dist_cts itself; --suite demo prepares all of them"]


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in COMMANDS:
        try:
            return COMMANDS[arguments[0]](arguments[1:])
        except (ValueError, OSError) as fault:
            print(f"error: {fault}", file=sys.stderr)
            return 1
    usage = parser()
    args = usage.parse_args(arguments)
    if bool(args.dataset) == bool(args.suite):
        usage.error("expected either a dataset or --suite")
    try:
        options = Options.model_validate({key: getattr(args, key) for key in Options.model_fields})
        tasks = suites.suite(args.suite) if args.suite else [suites.SuiteTask(dataset=args.dataset)]
        entries = [task.entry for task in tasks]
    except ValidationError as error:
        fault = error.errors()[0]
        usage.error(f"argument --{str(fault['loc'][0]).replace('_', '-')} is {fault['input']}: {words(fault)}")
    except (ValueError, FileNotFoundError) as fault:
        usage.error(str(fault))
    if args.workers < 1:
        usage.error(f"argument --workers: expected at least 1, not {args.workers}")
    if args.root is None and any(
        entry.needs_root and not task.root for entry, task in zip(entries, tasks, strict=True)
    ):
        usage.error(f"{args.dataset or args.suite} needs --root, the folder of the raw data")
    if args.out.exists() and not args.out.is_dir():
        usage.error(f"--out {args.out}: is not a folder; choose the folder that shall hold the tasks")
    if args.name and args.suite:
        usage.error("--name cannot be combined with --suite")
    if args.download and not args.suite and not entries[0].download:
        usage.error(f"--download is not available for {args.dataset}; source: {entries[0].where}")
    try:
        if args.download:
            for entry in entries:
                _download(entry, args.root)
        return _suite(tasks, options, args) if args.suite else _one(entries[0], options, args)
    except (OptionError, FileNotFoundError) as fault:
        usage.error(str(fault))
    except NotThere as fault:
        print(f"error: {fault}; source of the raw data: {entries[0].where}", file=sys.stderr)
    except (ValueError, OSError, ImportError) as fault:
        print(f"error: {fault}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"error: interrupted; complete tasks in {args.out} are kept; rerun to prepare the rest", file=sys.stderr)
        if args.suite:
            sys.stderr.flush()
            os._exit(1)  # do not wait for threads in the middle of a file; the next run deletes their temporary files
    return 1


def _download(entry: catalog.Entry, root: Path) -> None:
    if entry.download:
        print(f"{entry.name}: downloading into {root}", flush=True)
        root.mkdir(parents=True, exist_ok=True)
        entry.download(root)


def _one(entry: catalog.Entry, options: Options, args: argparse.Namespace) -> int:
    folder, start = args.out / (args.name or task_name(entry, args.root, options)), time.monotonic()
    try:
        train, test = prepare(entry, args.root, folder, options, args.workers, args.on_error)
    except (OptionError, FileNotFoundError) as fault:
        raise type(fault)(f"{entry.name}: {fault}") from None
    whole = options.split_classes is None and options.limit is None
    print(summary(entry, folder, train, test, time.monotonic() - start, whole), flush=True)
    return 0


def _suite(tasks: list[suites.SuiteTask], options: Options, args: argparse.Namespace) -> int:
    given = {key: value for key, value in options if value != Options.model_fields[key].default}
    tasks = [task.model_copy(update=given | ({"expected": None} if given else {})) for task in tasks]
    start = time.monotonic()

    def done(task: suites.SuiteTask, folder: Path, outcome: suites.Outcome) -> None:
        if isinstance(outcome, Exception):
            print(f"{folder}: {suites.verdict(task, outcome)}", flush=True)
        else:
            print(summary(task.entry, folder, *outcome, time.monotonic() - start, whole=False), flush=True)

    outcomes = suites.prepare_all(tasks, args.root, args.out, args.workers, args.on_error, done=done)
    print("\n" + suites.table(tasks, outcomes))
    verdicts = [suites.verdict(task, outcome) for task, outcome in zip(tasks, outcomes, strict=True)]
    return 1 if {"failed", "differs"} & set(verdicts) or set(verdicts) == {"missing"} else 0


def _list(arguments: list[str]) -> int:
    Parser(prog="dist-cts prepare list", description="List the datasets and suites.").parse_args(arguments)
    for entry in catalog.CATALOG.values():
        train, test = entry.counts or (None, None)
        size = f"{train:,} train, {f'{test:,}' if test else 'no'} test images, " if entry.counts else ""
        kind = f"{entry.classes} classes, " if entry.classes else ""
        colour = "greyscale" if entry.channels == 1 else "RGB"
        print(f"{entry.name}: {size}{kind}{entry.pixels or 'original'} px, {colour}")
        for label, text in (
            ("from", entry.where),
            ("cite", entry.citation),
            ("licence", entry.licence),
            ("note", entry.note),
        ):
            if text:
                print(f"    {label}: {text}")
    print("suites:")
    for name in suites.NAMES:
        print(f"    {name}: {', '.join(task.name or task.dataset for task in suites.suite(name))}")
    return 0


def _verify(arguments: list[str]) -> int:
    usage = Parser(prog="dist-cts prepare verify", description="Verify .beton files.")
    usage.add_argument("paths", nargs="+", type=Path, metavar="PATH", help=".beton files, or folders that contain them")
    paths, faults = usage.parse_args(arguments).paths, 0
    for path in paths:
        manifests = [file.with_suffix(".beton") for file in path.rglob("*.json")] if path.is_dir() else []
        for file in sorted({*path.rglob("*.beton"), *manifests}) if path.is_dir() else [path]:
            try:
                manifest = beton.verify(file)
                print(f"{file}: ok, {manifest.count:,} images, {manifest.classes} classes")
            except (ValueError, OSError) as fault:
                print(f"error: {fault}", file=sys.stderr)
                faults += 1
        if path.is_dir() and not any(path.rglob("*.beton")):
            raise ValueError(f"{path}: no .beton files found")
    return 1 if faults else 0


def _show(arguments: list[str]) -> int:
    usage = Parser(prog="dist-cts prepare show", description="Draw random images with their labels.")
    usage.add_argument("beton", type=Path, help="a .beton file")
    usage.add_argument("--to", type=Path, required=True, help="the PNG to write")
    usage.add_argument("--count", type=int, default=40, help="number of images (default: 40)")
    usage.add_argument("--seed", type=int, default=0)
    args = usage.parse_args(arguments)
    if args.count < 1:
        usage.error(f"argument --count: expected at least 1, not {args.count}")
    contact_sheet.draw(args.beton, args.to, args.count, args.seed)
    print(f"{args.to}: written")
    return 0


COMMANDS = {"list": _list, "verify": _verify, "show": _show}


def summary(entry: catalog.Entry, folder: Path, train: Manifest, test: Manifest, seconds: float, whole: bool) -> str:
    line = (
        f"{folder}: {train.count:,} train and {test.count:,} test images, {train.classes} classes, "
        f"{train.pixels} x {train.pixels} {'RGB' if train.channels == 3 else 'greyscale'}, {train.mode}, "
        f"{(train.bytes + test.bytes) / 1e6:,.0f} MB, {seconds:.1f} s"
    )
    skipped = len(train.skipped) + len(test.skipped)
    if skipped:
        line += f"; skipped {skipped} that cannot be decoded, listed as `skipped` in the manifests"
    if whole and entry.counts and sum(entry.counts) != train.count + test.count + skipped:
        line += f"; the full dataset has {entry.counts[0]:,} and {entry.counts[1]:,}"
    return line
