"""Draws figures/full_size.png from both runs: `python -m tests.benchmarks.full_size`."""

from labkit.instruments import plots
from labkit.train import History
from tests.benchmarks.common import FIGURES, median


def main() -> None:
    runs = {n: History.load(FIGURES / f"full_n{n}.json") for n in (1, 4)}
    seconds = {n: median([e.seconds for e in run.epochs]) for n, run in runs.items()}
    shares = {n: sum(e.waiting for e in r.epochs) / sum(e.seconds for e in r.epochs)
              for n, r in runs.items()}  # fmt: skip
    figure = plots.epochs(
        {f"{n} thread{'s' if n > 1 else ''}, {shares[n]:.0%} waiting": r for n, r in runs.items()},
        f"4 threads: {seconds[1] / seconds[4]:.2f}x faster, {seconds[4]:.1f} s an epoch",
    )
    plots.save(figure, FIGURES / "full_size.png")


if __name__ == "__main__":
    main()
