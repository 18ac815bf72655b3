"""The long checks: every fault 100 times, and five minutes at full rate.

    python -m tests.soak --faults     # tests/test_faults.py, 100 repeats; figures/faults_100.json
    python -m tests.soak              # threads, then processes; figures/soak.json

Both end with exit code 1 if anything failed. `--faults` runs several copies of the tests side by
side, since most of each test is waiting; a copy that hangs ends itself and is counted as a failure.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import numpy as np
import psutil

from labkit import QueueRunner
from labkit.machine import describe_machine
from labkit.quiet import tf

v1 = tf.compat.v1
ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "figures"
_MOST_SAMPLES = 200_000  # of one worker in a second


def faults(repeats: int, copies: int) -> bool:
    """Runs the fault tests `repeats` times in all and writes what came of each."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        shares = [len(range(copy, repeats, copies)) for copy in range(copies)]
        running = []
        for copy, share in enumerate(shares):
            command = f"-m pytest -q tests/test_faults.py --junitxml={folder}/{copy}.xml"
            with open(f"{folder}/{copy}.log", "w") as log:
                running.append(
                    subprocess.Popen(
                        [sys.executable, *command.split()],
                        cwd=ROOT,
                        env={**os.environ, "LABKIT_REPEATS": str(share)},
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )
        passed: Counter[str] = Counter()
        failed: list[str] = []
        for copy, process in enumerate(running):
            process.wait()
            report = Path(f"{folder}/{copy}.xml")
            if not report.exists():
                failed.append("no report: " + _stacks(Path(f"{folder}/{copy}.log").read_text()))
                continue
            for case in ElementTree.parse(report).iter("testcase"):
                name, _, chosen = case.get("name", "").partition("[")
                kind = "-".join(chosen.rstrip("]").split("-")[1:])
                outcome = {child.tag: child.get("message") for child in case}
                wrong = outcome.get("failure") or outcome.get("error")
                if wrong:
                    failed.append(f"{case.get('name')}: {wrong[:500]}")
                elif "skipped" not in outcome:
                    passed[f"{name}[{kind}]" if kind else name] += 1
    result = {
        "command": f"python -m tests.soak --faults --repeats {repeats} --copies {copies}",
        "machine": describe_machine(),
        "seconds": round(time.monotonic() - began),
        "passed": sum(passed.values()),
        "failed": [_portable(text) for text in failed],
        "passed_by_case": dict(sorted(passed.items())),
    }
    _write("faults_100" if repeats >= 100 else f"faults_{repeats}", result)
    print(f"{result['passed']} passed, {len(failed)} failed, {result['seconds']} s")
    print("\n".join(failed))
    return not failed


def soak(workers: str, seconds: float) -> dict:
    """Runs two workers at full rate and accounts for every sample and for the memory."""
    with tempfile.TemporaryDirectory() as folder:

        def counted(worker, n_workers):
            """Images that carry their worker and number; at the end, the total goes to a file."""
            rows = 32
            images = np.ones((rows, 28, 28, 1), np.float32)
            number, end = 0, time.time() + seconds
            while time.time() < end:
                yield np.arange(number, number + rows), np.full(rows, worker), images
                number += rows
            Path(f"{folder}/{worker}").write_text(str(number))

        runner = QueueRunner(counted, 32, 2, workers)
        # As large as they can become, and touched: arrays that grow would leave holes in the heap.
        seen = [np.full(int(seconds * _MOST_SAMPLES), 0, np.uint8) for _ in range(2)]
        own = sum(count.nbytes for count in seen)
        trace, began, next_sample = [], time.monotonic(), 0.0
        with tf.Graph().as_default():
            inputs = runner.get_inputs()
            config = v1.ConfigProto(intra_op_parallelism_threads=1, inter_op_parallelism_threads=1)
            with v1.Session(config=config) as sess, runner.start(sess):
                try:
                    while True:
                        numbers, who, _ = sess.run(inputs)
                        for worker in range(2):
                            np.add.at(seen[worker], numbers[who == worker], 1)
                        if time.monotonic() - began > next_sample:
                            next_sample += 1.0
                            trace.append(_memory() - own)
                except tf.errors.OutOfRangeError:
                    pass
        took = time.monotonic() - began
        made = [int(Path(f"{folder}/{worker}").read_text()) for worker in range(2)]
    once = [int((count == 1).sum()) for count in seen]
    repeated = [int((count > 1).sum()) for count in seen]
    # The first fifth is left out: caches of the allocators fill up there.
    early, late = trace[len(trace) // 5 : 2 * len(trace) // 5], trace[-len(trace) // 5 :]
    return {
        "seconds": round(took, 1),
        "samples_made": made,
        "samples_seen_once": once,
        "samples_repeated": repeated,
        "batches_per_second": round(sum(made) / 32 / took, 1),
        "memory_growth": statistics.median(late) / statistics.median(early) - 1,
        "memory_bytes_each_second": trace,
    }


def _memory() -> int:
    """Bytes of this process and its children that are theirs alone, and the shared ones once."""
    me = psutil.Process()
    return sum(process.memory_full_info().pss for process in [me, *me.children()])


def _stacks(log: str) -> str:
    """What a copy that hung wrote at its end: the newest lines of each thread come first."""
    hung = log.rfind("Timeout (")
    return log[max(hung, 0) :][:10_000] if hung >= 0 else log[-10_000:]


def _portable(text: str) -> str:
    """Without this machine's folders: the result is kept in the repository."""
    for folder in (ROOT, Path(sys.prefix), Path(tempfile.gettempdir()), Path.home()):
        text = text.replace(f"{folder}/", "")
    return text


def _write(name: str, result: dict) -> None:
    FIGURES.mkdir(exist_ok=True)
    (FIGURES / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", action="store_true", help="repeat the fault tests instead")
    parser.add_argument("--repeats", type=int, default=100, help="of each fault (default: 100)")
    parser.add_argument("--copies", type=int, default=4, help="run side by side (default: 4)")
    parser.add_argument("--seconds", type=float, default=300, help="of each soak (default: 300)")
    options = parser.parse_args()
    if options.faults:
        return 0 if faults(options.repeats, options.copies) else 1
    results = {workers: soak(workers, options.seconds) for workers in ("thread", "process")}
    fine = True
    for workers, result in results.items():
        complete = result["samples_made"] == result["samples_seen_once"]
        flat = abs(result["memory_growth"]) < 0.02
        fine = fine and complete and flat and not any(result["samples_repeated"])
        print(
            f"{workers}: {sum(result['samples_made'])} samples, "
            f"{'every one seen once' if complete else 'NOT every one seen once'}, "
            f"{result['batches_per_second']} batches/s, memory {result['memory_growth']:+.2%}"
        )
    command = f"python -m tests.soak --seconds {options.seconds:g}"
    _write("soak", {"command": command, "machine": describe_machine(), **results})
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
