"""Python's lock, in threads and processes: `python -m tests.benchmarks.lock`.

Trains the CNN with 20 ms of pure Python a batch: 1 thread, 2 threads, 1 process, 2 processes, in
turn; medians of the ratios to 1 thread within a round.
"""

from labkit.data import MnistDataGenerator
from labkit.workloads import busy_python
from tests.benchmarks.common import Steps, compute_only, median, spread, write

SETTINGS = (("thread", 1), ("thread", 2), ("process", 1), ("process", 2))


def main() -> None:
    factory = MnistDataGenerator(32, busy_python(0.02)).passes_iterator
    computes = [compute_only()]
    rates: dict[str, list[float]] = {f"{n} {kind}": [] for kind, n in SETTINGS}
    for _ in range(9):
        for kind, n in SETTINGS:
            with Steps("queue", factory, n, kind, min_after=0) as run:
                run.rate(40)
                rates[f"{n} {kind}"].append(run.rate(120))
        computes.append(compute_only())
    one = rates["1 thread"]
    results = {
        "steps_per_second": {label: median(values) for label, values in rates.items()},
        "over_1_thread": {
            label: median([a / b for a, b in zip(values, one, strict=True)])
            for label, values in rates.items()
        },
        "compute_only": median(computes),
        "compute_only_drift": spread(computes),
    }
    print(results)
    write("benchmark_lock", results)


if __name__ == "__main__":
    main()
