"""Which session thread pools: `python -m tests.benchmarks.pools`. Interleaved."""

from labkit.data import MnistDataGenerator
from labkit.workloads import distort
from tests.benchmarks.common import Steps, median, spread, write

POOLS = {"1 and 1": (1, 1), "1 and 2": (1, 2), "2 and 2": (2, 2), "TensorFlow's own": (0, 0)}


def main() -> None:
    results = {}
    factory = MnistDataGenerator(32, distort()).passes_iterator
    for name, arguments in (("constant", ()), ("queue", (factory, 1))):
        rates: dict[str, list[float]] = {label: [] for label in POOLS}
        for _ in range(5):
            for label, pools in POOLS.items():
                # Opened and closed in turn: an idle queue that refills would take a core.
                with Steps(name, *arguments, pools=pools) as run:
                    run.rate(150)
                    rates[label].append(run.rate(300))
        results[name] = {
            label: {"steps_per_second": median(values), "drift": spread(values),
                    "over_1_and_1": median([v / w for v, w in
                                            zip(values, rates["1 and 1"], strict=True)])}
            for label, values in rates.items()
        }  # fmt: skip
        print(name, results[name])
    write("benchmark_pools", results)


if __name__ == "__main__":
    main()
