"""The command line of `python -m labkit.diagnose`: for a terminal, and for somebody's CI."""

import argparse
import difflib
import inspect
import os
import sys
from importlib import import_module
from importlib.util import find_spec
from operator import attrgetter
from typing import Any

from labkit import WorkerError
from labkit.cli import Parser
from labkit.engine.tracebacks import describe

_OURS = ("diagnose: ", "labkit: ")  # how an error begins that tells of a wrong argument


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"expected a share from 0 to 1, got {text!r}")
    return share


def _parser() -> Parser:
    parser = Parser(
        prog="python -m labkit.diagnose",
        usage="python -m labkit.diagnose MODULE:FACTORY --model MODULE:STEP [flags]",
        description="Measure whether training waits for data, and which workers would cure that.",
        epilog=(
            "exit codes: 0; 1 where the model waits for more than --fail-if-waiting, or a worker "
            "failed; 2 for wrong use; 130 after Ctrl-C. Modules in this folder come first."
        ),
    )
    add = parser.add_argument
    what = "an iterator factory or a data set, as for QueueRunner"
    add("factory", metavar="MODULE:FACTORY", help=what)
    step = "a training step, called as step(batch) or step(x, y); or a compiled Keras model"
    step += "; or the seconds that a step takes"
    add("--model", metavar="MODULE:STEP", required=True, help=step)
    size = "samples per step (default: as the batches have, 32 of single samples)"
    add("--batch_size", metavar="SAMPLES", type=int, help=size)
    total = "rough total to spend (default: %(default)s)"
    add("--seconds", metavar="SECONDS", type=float, default=20.0, help=total)
    add("--json", metavar="FILE", help="write the report to FILE, for labkit.load_report")
    add("--html", metavar="FILE", help="write it as a page that opens anywhere, offline")
    most = "exit with 1 if the model waits for a larger share of its time in a serial loop, 0 to 1"
    add("--fail-if-waiting", metavar="SHARE", type=_share, help=most)
    return parser


def found(parser: Parser, flag: str, text: str) -> Any:
    """What `module:name` names, in the current folder first; ends the program if nothing."""
    sys.path[:0] = [] if {"", os.getcwd()} & set(sys.path) else [os.getcwd()]
    module, _, name = text.partition(":")
    top = module.partition(".")[0]
    if not (top and name) or "/" in module or module.endswith(".py"):
        parser.error(
            f"{flag}: expected module:name, as my_module:factory for what my_module.py in this "
            f"folder calls factory, got {text!r}"
        )
    if top not in sys.modules and find_spec(top) is None:
        parser.error(f"{flag}: there is no module {top} in this folder, and none is installed")
    import_module("labkit.quiet")  # before theirs: TensorFlow's start-up lines stay off the screen
    try:
        home = import_module(module)
    except (Exception, SystemExit) as error:
        absent = error.name if isinstance(error, ModuleNotFoundError) else None
        if absent and (module == absent or module.startswith(f"{absent}.")):
            parser.error(f"{flag}: there is no module {absent}")
        summary, traceback = describe(error)
        print(traceback, file=sys.stderr)
        parser.error(f"{flag}: to import {module} {summary}")
    try:
        return attrgetter(name)(home)
    except AttributeError:
        near = difflib.get_close_matches(name, vars(home), 1)
        meant = f", did you mean {near[0]}?" if near else ""
        parser.error(f"{flag}: module {module} has no {name}{meant}")


def _model_of(parser: Parser, text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        model = found(parser, "--model", text)
    # Whoever names the function that makes a model would get an error of Python's, a minute later.
    if inspect.isfunction(model) and not inspect.signature(model).parameters:
        parser.error(
            "--model: expected a training step, which takes a batch, or a compiled Keras model, "
            f"got {text}, which takes nothing. If it makes a model, write model = "
            f"{model.__name__}() in the module, and name that"
        )
    return model


def _diagnosed(parser: Parser, given: argparse.Namespace) -> Any:
    """The report; ends the program where diagnose does not take what was given."""
    factory = found(parser, "MODULE:FACTORY", given.factory)
    model = _model_of(parser, given.model)
    from labkit.instruments.diagnosis import diagnose  # which brings TensorFlow

    shown = sys.stderr.isatty()  # a log has no use for a bar
    try:
        return diagnose(factory, model, given.seconds, given.batch_size, progress=shown)
    except (TypeError, ValueError) as error:
        ours = next((start for start in _OURS if str(error).startswith(start)), None)
        if ours is None:
            raise  # the user's step: its traceback tells more
        parser.error(str(error).removeprefix(ours).rstrip("."))


def _kept(report: Any, given: argparse.Namespace) -> str:
    """Writes the files; returns why that failed, or ""."""
    try:
        if given.json:
            report.save(given.json)
        if given.html:
            report.to_html(given.html)
    except OSError as error:
        return f"what was measured could not be written: {error}"
    return ""


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns 0; or 1 where the model waits for more than is allowed, a worker
    failed or a file could not be written; 130 after Ctrl-C. Wrong use exits with 2."""
    parser = _parser()
    given = parser.read(arguments, "json", "html")
    code = 1
    try:
        report = _diagnosed(parser, given)
        print(report)
        told = [_kept(report, given)]
        if given.fail_if_waiting is not None and report.waiting > given.fail_if_waiting:
            told.append(
                f"in a serial loop the model waits for data {report.waiting:.1%} of its time, more "
                f"than the {given.fail_if_waiting:.1%} of --fail-if-waiting."
            )
    except WorkerError as error:
        told = [str(error)]
    except KeyboardInterrupt:
        code, told = 130, ["interrupted; the workers are stopped."]
    for text in filter(None, told):
        print(f"{parser.prog}: {text}", file=sys.stderr)
    return code if any(told) else 0
