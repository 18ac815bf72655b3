"""What `labkit.watch(live=True)` costs in a notebook. Writes figures/benchmark_live.json.

    python -m tests.benchmarks.live [--rounds 3] [--seconds 30]

In a kernel, fits of that length with `labkit.watch()` and with `labkit.watch(live=True)` in turn
(A B A B). Cost, as a share of one core: processor seconds of the thread that draws and of the one
that samples, by their own clocks; and those of the whole process, with less without, for the same
number of steps.
"""

import argparse
import ast
import os
from typing import Any

from jupyter_client.manager import start_new_kernel

from tests.benchmarks.common import FIGURES, median, write

_PAUSE = 0.01
_PREPARE = f"""
import time
import numpy as np
import labkit
from labkit.instruments.live import Live, of_fit
from labkit.instruments.watch_fit import FitWatch
from labkit.quiet import tf

def factory():
    x = np.zeros((32, 64), np.float32)
    while True:
        time.sleep({_PAUSE})
        yield x, x[:, :1]

layers = [tf.keras.Input((64,)), tf.keras.layers.Dense(64), tf.keras.layers.Dense(1)]
model = tf.keras.Sequential(layers)
model.compile("sgd", "mse")
drawn, draw = [], Live._draw
Live._draw = lambda *given, **named: drawn.append(draw(*given, **named)) or drawn[-1]

def one(live, seconds):
    made = []
    kept = FitWatch((lambda: made.append(of_fit()) or made[-1]) if live else None)
    drawn.clear()
    with labkit.QueueRunner(factory, 32, capacity=640, min_after_dequeue=320) as runner:
        data, steps = runner.dataset(), int(seconds / {_PAUSE} / 1.05)
        began, cpu = time.perf_counter(), time.process_time()
        model.fit(data, steps_per_epoch=steps, verbose=0, shuffle=False, callbacks=[kept])
        wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    result = {{"wall": wall, "process": cpu}}
    if live:
        sampling = made[0].sight.usage.cost
        result |= {{"drawing": sum(drawn) / wall, "sampling": sampling, "pictures": len(drawn),
                   "first picture, s": drawn[0],
                   "median picture, s": sorted(drawn)[len(drawn) // 2]}}
    return result
one(True, 3); one(False, 3);
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="What labkit.watch(live=True) costs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=30.0)
    given = parser.parse_args()
    environment = {**os.environ, "PYTHONPATH": str(FIGURES.parent)}
    manager, client = start_new_kernel(kernel_name="python3", env=environment)
    values: list[str] = []

    def run(source: str) -> Any:
        def keep(message: Any) -> None:
            if message["msg_type"] == "execute_result":
                values.append(message["content"]["data"]["text/plain"])

        reply = client.execute_interactive(source, output_hook=keep, timeout=600)["content"]
        if reply["status"] != "ok":
            raise RuntimeError("\n".join(reply["traceback"]))
        return values and ast.literal_eval(values[-1])

    try:
        run(_PREPARE)
        rows: dict[bool, list[dict[str, float]]] = {False: [], True: []}
        for _ in range(given.rounds):
            for live, found in rows.items():
                found.append(run(f"one({live}, {given.seconds})"))
                print("live" if live else "without", found[-1], flush=True)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    pairs = zip(rows[True], rows[False], strict=True)
    more = [(a["process"] - b["process"]) / a["wall"] for a, b in pairs]
    results = {
        "drawing and sampling, cores": median([a["drawing"] + a["sampling"] for a in rows[True]]),
        "process, with - without, cores": median(more),
        "of the rounds": [round(cores, 4) for cores in more],
        "rounds with": rows[True],
        "rounds without": rows[False],
    }
    print({name: results[name] for name in list(results)[:3]})
    write("benchmark_live", results)


if __name__ == "__main__":
    main()
