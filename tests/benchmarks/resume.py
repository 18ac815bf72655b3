"""Kills a training with SIGKILL at a random step, lets it go on, and holds it against one that
nobody has disturbed: the samples of each step, the weights at the end, the epochs, to the bit.

    python -m tests.benchmarks.resume               # 20 times, in turn all variants
    python -m tests.benchmarks.resume --times 2
"""

import argparse
import faulthandler
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
VARIANTS: dict[str, dict[str, Any]] = {
    "both": {"mirrored": True, "prefetch": 4, "samples": True},
    "plain": {},
    "prefetch": {"prefetch": 4, "samples": True},
    "mirrored": {"mirrored": True},
    "execution": {"execution": 4, "samples": True, "prefetch": 1},
    "steps": {"steps": 10, "prefetch": 2, "execution": 5},
}
EPOCHS, CHUNKS, SCALE = 3, 40, 4096
_MOST_SECONDS = 400  # of one program, on a machine that does much else


def factory(worker: int, n_workers: int, epoch: int, start: int = 0) -> Any:
    for number in range(start + worker, CHUNKS, n_workers):
        rng = np.random.default_rng(np.random.SeedSequence([1, epoch], spawn_key=(number,)))
        time.sleep(os.urandom(1)[0] / 255 * 0.02)
        x = rng.random((4, 4), np.float32)
        y = x.sum(1, keepdims=True)
        x[:, 0] = (4 * number + np.arange(4) + 1000 * epoch) / SCALE
        yield x, y


def train(folder: Path, variant: str, resumes: bool) -> None:
    """The program that is killed. Each step adds a line to `steps`; at the end there is `end`."""
    import tensorflow as tf

    import labkit
    import labkit.keras

    chosen = VARIANTS[variant]
    folder.mkdir(exist_ok=True)
    log = (folder / "steps").open("a", buffering=1)

    def note(step: np.ndarray, ids: np.ndarray) -> np.ndarray:
        log.write(f"{step} {(ids * SCALE).astype(int).tolist()}\n")
        return np.int32(0)

    class Noting(tf.keras.Sequential):
        def train_step(self, data: Any) -> Any:
            ids = data[0][:, 0]
            step = tf.identity(self.optimizer.iterations)
            done = tf.numpy_function(note, [step, ids], tf.int32)
            with tf.control_dependencies([done]):
                return super().train_step(data)

    tf.keras.utils.set_random_seed(1)
    devices = ["CPU:0", "CPU:1"]
    mirrored = tf.distribute.MirroredStrategy(devices) if chosen.get("mirrored") else None
    with (mirrored or tf.distribute.get_strategy()).scope():
        layers = tf.keras.layers
        dropout = layers.Dropout(0.3, seed=3)
        model = Noting([layers.Dense(4, "tanh"), dropout, layers.Dense(1)])
        optimizer = tf.keras.optimizers.Adam(0.01)
        model.compile(optimizer, "mse", steps_per_execution=chosen.get("execution", 1))
    samples = 4 * CHUNKS if chosen.get("samples") else None
    sizes = {"capacity": 60, "min_after_dequeue": 24, "samples": samples}
    with labkit.QueueRunner(factory, 6, 2, order="fixed", seed=1, **sizes) as runner:
        data, epochs = runner.dataset(), EPOCHS
        if "steps" in chosen:
            data, epochs = data.repeat(), 8
        if "prefetch" in chosen:
            data = data.prefetch(chosen["prefetch"])
        callbacks = [labkit.keras.Resume(runner, folder / "state", 5)] if resumes else []
        options = {"steps_per_epoch": chosen.get("steps"), "epochs": epochs, "shuffle": False}
        history = model.fit(data, verbose=0, callbacks=callbacks, **options)
    weights = [weight.tolist() for weight in model.get_weights()]
    end = {"weights": weights, "epochs": history.epoch, "losses": history.history["loss"]}
    (folder / "end").write_text(json.dumps(end))


def two_processors() -> None:
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    two = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(cpu, two)


def run(
    folder: Path,
    variant: str,
    *,
    kill_at: int | None = None,
    undisturbed: Path | None = None,
) -> None:
    """The program in a process of its own, to its end, or until its step `kill_at`.

    Args:
        undisturbed: where it then trains anew, without going on from anything.
    """
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.benchmarks.resume", "--train", variant, str(folder)]
    command += [] if undisturbed is None else ["--undisturbed", str(undisturbed)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    log = folder / "steps"
    with (folder / "said").open("w") as said:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=said,
            stderr=said,
        )
        try:
            deadline = time.monotonic() + _MOST_SECONDS
            while process.poll() is None and time.monotonic() < deadline:
                if kill_at is not None and log.exists():
                    lines = log.read_text().splitlines()
                    if lines and int(lines[-1].split()[0]) >= kill_at:
                        process.send_signal(signal.SIGKILL)
                        break
                time.sleep(0.002)
        finally:
            if process.poll() is None:
                process.kill()
            code = process.wait()
    if code != (0 if kill_at is None else -signal.SIGKILL):
        raise RuntimeError(f"{variant} ended with {code}:\n{(folder / 'said').read_text()[-3000:]}")


def steps_of(folder: Path) -> dict[str, set[str]]:
    """The samples of each step, a part for each replica. One that was made twice, with other
    samples, has parts too many."""
    found: dict[str, set[str]] = {}
    for line in (folder / "steps").read_text().splitlines():
        step, _, ids = line.partition(" ")
        if ids.endswith("]"):  # else it was killed as it wrote
            found.setdefault(step, set()).add(ids)
    return found


def differences(killed: Path, undisturbed: Path) -> list[str]:
    """What a training that went on has that one without interruption has not."""
    ends = [json.loads((folder / "end").read_text()) for folder in (killed, undisturbed)]
    wrong = [name for name in ("weights", "epochs") if ends[0][name] != ends[1][name]]
    if not np.allclose(ends[0]["losses"], ends[1]["losses"], rtol=1e-5):
        wrong.append("losses")
    if steps_of(killed) != steps_of(undisturbed):
        wrong.append("samples")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=20, help="kills (default: 20)")
    parser.add_argument("--train", nargs=2, metavar=("VARIANT", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--undisturbed", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        faulthandler.dump_traceback_later(_MOST_SECONDS - 20)
        two_processors()
        train(Path(options.train[1]), options.train[0], True)
        if options.undisturbed:
            train(Path(options.undisturbed), options.train[0], False)
        return 0
    failed, rng = 0, np.random.default_rng()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.times):
            variant = list(VARIANTS)[number % len(VARIANTS)]
            undisturbed = Path(folder) / variant
            new = None if undisturbed.exists() else undisturbed
            killed, step = Path(folder) / str(number), int(rng.integers(1, 70))
            run(killed, variant, kill_at=step)
            run(killed, variant, undisturbed=new)
            wrong = differences(killed, undisturbed)
            failed += bool(wrong)
            print(f"{variant}, killed in step {step}: {wrong or 'the same'}", flush=True)
    print(f"{options.times - failed} of {options.times} are the same")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
