"""`dist-cts plot`: draws the training curves of runs."""

from pathlib import Path

from dist_cts.commands.parser import Parser
from dist_cts.run.exit_codes import DONE, finish


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        prog="dist-cts plot",
        description="Draw loss, metrics and steps per second against the inner steps per task: of one run a line per "
        "task, of several the means over their tasks. Values on the test splits (eval_every) are dashed.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--out", type=Path, default=Path("curves.png"), help="the PNG (default: %(default)s)")
    args = parser.parse_args(arguments)

    def command() -> int:
        from dist_cts.run.curves import draw_curves  # late: scipy and matplotlib take a second

        draw_curves(args.runs, args.out)
        print(f"{args.out}: written")
        return DONE

    return finish(command)
