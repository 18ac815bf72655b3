"""The command line of `python -m labkit.train`: its flags, their checks, what it writes."""

import argparse
import difflib
import functools
import inspect
import shlex
import sys
from pathlib import Path
from typing import Any, NoReturn

from labkit import WorkerError, __version__
from labkit.checkpoint import CheckpointError
from labkit.data import MnistDataGenerator
from labkit.engine import KINDS
from labkit.settings import PIPELINES, check_settings
from labkit.train import History, train

_DEFAULTS = {name: p.default for name, p in inspect.signature(train).parameters.items()}


class Parser(argparse.ArgumentParser):
    """What labkit's commands have in common: looks, --version, the words for what is wrong."""

    def __init__(self, **given: Any) -> None:
        looks = functools.partial(argparse.HelpFormatter, max_help_position=30)
        super().__init__(**given, formatter_class=looks)
        self.add_argument("--version", action="version", version=f"labkit {__version__}")

    def read(self, arguments: list[str] | None, *files: str) -> argparse.Namespace:
        """The flags; ends the program where one is none, or one of `files` cannot be written."""
        given, unknown = self.parse_known_args(arguments)
        if unknown:
            self.refuse(unknown)
        for flag in files:
            path = getattr(given, flag)
            problem = path is not None and problem_with(path)
            if problem:
                self.error(f"--{flag}: {problem}")
        return given

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help lists every flag)\n")

    def refuse(self, unknown: list[str]) -> NoReturn:
        """Ends the program over flags that are none."""
        wrong = next((word for word in unknown if word.startswith("-")), None)
        if wrong is None:
            self.error(f"expected flags only, got {unknown[0]!r}")
        name = wrong.split("=")[0]
        near = difflib.get_close_matches(name, self._option_string_actions, 1)
        self.error(f"unknown flag {name}" + "".join(f", did you mean {flag}?" for flag in near))


def _number_of_workers(text: str) -> int | str:
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a count or auto, got {text!r}") from None


def _parser() -> Parser:
    parser = Parser(
        prog="python -m labkit.train",
        usage="python -m labkit.train [--n_thread COUNT] [flags]",
        description="Train the CNN on MNIST, by queue or feed_dict, and see where time goes.",
        epilog="Set TF_CPP_MIN_LOG_LEVEL=0 to see TensorFlow's own start-up lines.",
    )

    def group(title: str) -> Any:
        arguments = parser.add_argument_group(title)

        def add(*flags: str, help: str, **options: Any) -> None:
            name = options.get("dest", flags[0].lstrip("-"))
            default = _DEFAULTS.get(name)
            if default is not None:
                help += " (default: %(default)s)"
            arguments.add_argument(*flags, help=help, default=default, **options)

        return add

    add = group("how batches are made, and reach the model")
    kind = "which way; constant: one batch over and over, compute-only"
    add("--pipeline", choices=PIPELINES, help=kind)
    add(
        *("--n_thread", "--n_workers"),
        dest="n_workers",
        metavar="COUNT",
        type=_number_of_workers,
        help="workers that make batches; auto: as many as it takes",
    )
    kind = "kind of worker; process for generators that hold Python's lock; ray: a Ray cluster's"
    add("--workers", choices=KINDS, help=kind)
    sleeps = "time that the generator sleeps per batch, standing for heavy work"
    add("--delay", metavar="SECONDS", type=float, help=sleeps)
    holds = "what the queue holds (default: 2000, more for batches of over 250)"
    add("--capacity", metavar="SAMPLES", type=int, help=holds)
    stays = "what stays in it for mixing (default: 1000, more for batches of over 250)"
    add("--min_after_dequeue", metavar="SAMPLES", type=int, help=stays)
    turns = "of batches; fixed: in turn, the same in each run with the same --seed (default: any)"
    add("--order", choices=("any", "fixed"), help=turns)

    add = group("training")
    add("--epochs", metavar="COUNT", type=int, help="epochs")
    add("--steps", metavar="COUNT", type=int, help="steps per epoch")
    add("--batch_size", metavar="SAMPLES", type=int, help="samples per step")
    add("--learning_rate", metavar="RATE", type=float, help="Adam's step size, no unit")
    add("--seed", metavar="INTEGER", type=int, help="of weights, order and shuffling")

    add = group("what is kept")
    saved = "save after each epoch, and on Ctrl-C; the same line goes on; --order is fixed then"
    add("--checkpoint", metavar="DIR", help=saved)
    add("--save_every", metavar="COUNT", type=int, help="after so many steps, too")
    add("--log_dir", metavar="DIR", help="write TensorBoard summaries to DIR/train and DIR/valid")
    kept = "write every epoch's figures to FILE, also if the run is interrupted"
    add("--json", metavar="FILE", help=kept)
    drawn = "draw each epoch's waiting and computing time to FILE, a .png, .pdf or .svg"
    add("--plot", metavar="FILE", help=drawn)
    return parser


def problem_with(path: str) -> str | None:
    """Why a file cannot be written; found out before the training, not after it."""
    file = Path(path)
    try:
        if not file.resolve().parent.is_dir():
            return f"the folder of {path} does not exist; make it first"
        if file.is_dir():
            return f"expected a file, got the folder {path}"
        was_there = file.exists()
        if file.is_file() or not was_there:  # to open a pipe would wait for its reader
            file.open("a").close()
        if not was_there:
            file.unlink()
    except OSError as error:
        return f"expected a file that can be written, got {path} ({error.strerror})"
    return None


def _checked(parser: Parser, arguments: list[str] | None) -> dict[str, Any]:
    """The flags, by the names of train()'s arguments; ends the program where one is wrong."""
    options = vars(parser.read(arguments, "json", "plot"))
    plot = options["plot"]
    if plot and Path(plot).suffix not in (".png", ".pdf", ".svg"):
        parser.error(f"--plot: expected a file ending in .png, .pdf or .svg, got {plot}")
    try:
        MnistDataGenerator(options["batch_size"])
        check_settings(options)
    except ValueError as error:
        # The flag of n_workers has the article's name.
        text = str(error).split(": ", 1)[1].replace("n_workers", "n_thread")
        parser.error(text.rstrip("."))
    return options


def _keep(history: History, json_file: str | None, plot_file: str | None) -> None:
    if json_file:
        history.save(json_file)
    if plot_file:
        from labkit.instruments import plots

        begun = f"Ended early, in epoch {len(history.epochs)} of {history.settings['epochs']}"
        plots.save(plots.epochs(history, None if history.complete else begun), plot_file)


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns 0; wrong values exit with 2, a failed worker returns 1 and Ctrl-C
    130, both after what was measured until then has been written."""
    parser = _parser()
    options = _checked(parser, arguments)
    files = options.pop("json"), options.pop("plot")
    code, told = 0, ""
    history: History | None = None
    try:
        history = train(**options)
    except (MemoryError, CheckpointError) as error:
        parser.error(str(error))
    except (WorkerError, KeyboardInterrupt) as error:
        history = getattr(error, "history", None)
        stopped = isinstance(error, KeyboardInterrupt)
        code, told = (130, "interrupted; the workers are stopped.") if stopped else (1, str(error))
    if history is not None and history.epochs:  # else the figures of an earlier run stay
        words = sys.argv[1:] if arguments is None else arguments
        history.settings["command"] = shlex.join(["python", "-m", "labkit.train", *words])
        try:
            _keep(history, *files)
        except OSError as error:
            code, told = code or 1, f"{told} What was measured could not be written: {error}"
        else:
            told += f" What was measured until then is in {files[0]}." * bool(code and files[0])
    if told:
        print(f"{parser.prog}: {told.strip()}", file=sys.stderr)
    return code
