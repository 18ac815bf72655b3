"""The command line of `python -m labkit.race`."""

import shlex
import sys
from typing import Any

from labkit.cli import Parser
from labkit.instruments.command import found
from labkit.instruments.race.track import race


def _parser() -> Parser:
    parser = Parser(
        prog="python -m labkit.race",
        usage="python -m labkit.race [MODULE:FACTORY] [--model MODULE:STEP] [flags]",
        description="Run one generator and one model through every way of feeding there is here.",
        epilog=(
            "exit codes: 0; 1 where a run failed or the file could not be written; 2 for wrong "
            "use; 130 after Ctrl-C. What else can take part: tests/benchmarks/requirements.txt."
        ),
    )
    add = parser.add_argument
    what = "an iterator factory of yours, as for QueueRunner (default: labkit's own rows)"
    add("factory", metavar="MODULE:FACTORY", nargs="?", help=what)
    step = "a training step, a compiled Keras model, or the seconds of a step (default: the CNN)"
    add("--model", metavar="MODULE:STEP", help=step)
    add(
        "--rows",
        metavar="NAMES",
        help="only rows with one of these in their names, as JPEG,sleep 50:4",
    )
    add("--contestants", metavar="NAMES", help="only those with one of these; by commas")
    add("--rounds", metavar="COUNT", type=int, default=3, help="default: %(default)s")
    counted = "counted in each run (default: %(default)s)"
    add("--seconds", metavar="SECONDS", type=float, default=3.0, help=counted)
    add("--json", metavar="FILE", help="write the results to FILE, after each run")
    go_on = "go on with what the FILE of --json has, of the same race, ended before its end"
    add("--resume", action="store_true", help=go_on)
    add("--png", metavar="FILE", help="draw them to FILE")
    return parser


def _parts(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns 0; 1 where a run failed or a file could not be written; 130 after
    Ctrl-C. Wrong use exits with 2."""
    parser = _parser()
    given = parser.read(arguments, "json", "png")
    factory = found(parser, "MODULE:FACTORY", given.factory) if given.factory else None
    try:
        results = race(
            factory, _step(parser, given.model), rows=_parts(given.rows), rounds=given.rounds,
            contestants=_parts(given.contestants), seconds=given.seconds, json=given.json,
            resume=given.resume,
        )  # fmt: skip
    except (TypeError, ValueError) as error:
        if not str(error).startswith(("race: ", "labkit: ")):
            raise
        parser.error(str(error).removeprefix("race: ").rstrip("."))
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted; what ran is ended.", file=sys.stderr)
        return 130
    if given.json:
        results.data["command"] = shlex.join([*parser.prog.split(), *(arguments or sys.argv[1:])])
        results.save(given.json)
    print(f"\n{results}")
    if given.png:
        results.plot().savefig(given.png)
    of_all = [runs for row in results.data["rows"].values() for runs in row["rounds"].values()]
    return int(any("error" in run for runs in of_all for run in runs))


def _step(parser: Parser, text: str | None) -> Any:
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        return found(parser, "--model", text)
