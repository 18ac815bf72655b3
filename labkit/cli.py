"""The command line of `python -m labkit.train`: its flags, their checks, what it writes."""

import argparse
import sys
from pathlib import Path
from typing import Any

from labkit import WorkerError
from labkit.data import MnistDataGenerator
from labkit.engine import KINDS
from labkit.train import PIPELINES, check_settings, train


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:  # type: ignore[override]
        self.exit(2, f"{self.prog}: {message} (--help lists every flag)\n")


def _parser() -> _Parser:
    parser = _Parser(
        prog="python -m labkit.train",
        description="Train the CNN on MNIST, by queue or feed_dict, and see where time goes.",
        epilog="Set TF_CPP_MIN_LOG_LEVEL=0 to see TensorFlow's own start-up lines.",
        formatter_class=lambda prog: argparse.ArgumentDefaultsHelpFormatter(
            prog, max_help_position=32, width=120
        ),
    )
    add = parser.add_argument
    add("--n_thread", type=int, default=1, help="workers that make batches, a count")
    add(
        "--pipeline",
        choices=PIPELINES,
        default="queue",
        help="how batches reach the model; constant: one batch over and over, compute-only",
    )
    add(
        "--workers",
        choices=KINDS,
        default="thread",
        help="kind of worker; process for generators that hold Python's lock",
    )
    add("--epochs", type=int, default=10, help="epochs, a count")
    add("--steps", type=int, default=1875, help="steps per epoch, a count")
    add("--batch_size", type=int, default=32, help="samples per step, a count")
    add(
        "--delay",
        type=float,
        default=0.05,
        help="seconds that the generator sleeps per batch, standing for heavy work",
    )
    add("--learning_rate", type=float, default=1e-4, help="Adam's step size, no unit")
    add("--capacity", type=int, help="what the queue holds, samples; 2000 or as batches need")
    add(
        "--min_after_dequeue",
        type=int,
        help="what stays in the queue for mixing, samples; 1000 or as batches need",
    )
    add("--seed", type=int, default=0, help="of weights, order and shuffling, an integer")
    add(
        "--log_dir",
        metavar="DIR",
        help="write TensorBoard summaries to DIR/train and DIR/valid, a path",
    )
    add("--json", metavar="FILE", help="write every epoch's figures to FILE, a path")
    add(
        "--plot",
        metavar="FILE",
        help="draw each epoch's waiting and computing time to FILE, a path ending in .png or .pdf",
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns 0; wrong values exit with 2, a failed worker returns 1."""
    parser = _parser()
    options = vars(parser.parse_args(arguments))
    json_file, plot_file = options.pop("json"), options.pop("plot")
    options["n_workers"] = options.pop("n_thread")
    for flag, path in (("--json", json_file), ("--plot", plot_file)):
        if path and not Path(path).resolve().parent.is_dir():
            parser.error(f"{flag}: the folder of {path} does not exist; make it first")
        if path and Path(path).is_dir():
            parser.error(f"{flag}: expected a file, got the folder {path}")
    if plot_file and Path(plot_file).suffix not in (".png", ".pdf", ".svg"):
        parser.error(f"--plot: expected a file ending in .png, .pdf or .svg, got {plot_file}")
    try:
        check_settings(options)
        MnistDataGenerator(options["batch_size"])
    except ValueError as error:
        # The flag of n_workers has the article's name.
        text = str(error).split(": ", 1)[1].replace("n_workers", "n_thread")
        parser.error(text.rstrip("."))
    if options["log_dir"] and Path(options["log_dir"]).is_file():
        parser.error(f"--log_dir: expected a folder, got the file {options['log_dir']}")
    try:
        history = train(**options)
    except MemoryError as error:
        parser.error(str(error))
    except WorkerError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{parser.prog}: interrupted; the workers are stopped.", file=sys.stderr)
        return 130
    history.settings["command"] = " ".join(
        ["python -m labkit.train", *(sys.argv[1:] if arguments is None else arguments)]
    )
    if json_file:
        history.save(json_file)
    if plot_file:
        from labkit.instruments import plots

        plots.save(plots.epochs(history), plot_file)
    return 0
