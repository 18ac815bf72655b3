"""Draws figures/live_view.png and .json: a `fit` as `labkit.watch(live=True)` shows it.

    python -m tests.live_view [--seconds 15]

In a kernel of its own, as in JupyterLab: a small Keras model, and four threads that wait 20 ms a
batch, but 150 ms in the middle third of the run, as if a file server were slow for a while. The
last picture that the kernel sends is kept as it is; beside it, what it was drawn from. A view that
goes on after its fit is refused; what the kernel did meanwhile is on the terminal.
"""

import argparse
import ast
import base64
import json
import os
from typing import Any

from jupyter_client.manager import start_new_kernel

from tests.benchmarks.common import FIGURES

_LATER = 2.0  # seconds that a fit may take to end
_PREPARE = """
import faulthandler
import sys
import time
import labkit
from labkit.data import MnistDataGenerator
from labkit.machine import describe_machine, fast_cpu
fast_cpu()
from labkit.quiet import tf
layers = tf.keras.layers
model = tf.keras.Sequential([
    layers.Input((28, 28, 1)), layers.Conv2D(32, 3, activation="relu"), layers.MaxPool2D(),
    layers.Flatten(), layers.Dense(10),
])
model.compile("adam", tf.keras.losses.CategoricalCrossentropy(from_logits=True))
def read(images, labels):
    time.sleep(0.15 if SECONDS < 3 * (time.monotonic() - began) < 2 * SECONDS else 0.02)
    return images, labels

began = time.monotonic()
data = MnistDataGenerator(32, read)

from labkit.instruments import live
sights, sight = [], live.Sight  # those of the pictures that are shown
live.Sight = lambda *given, **named: sights.append(sight(*given, **named)) or sights[-1]

class Until(tf.keras.callbacks.Callback):
    def on_train_begin(self, logs=None):
        global began
        began = time.monotonic()

    def on_train_batch_end(self, step, logs=None):
        if time.monotonic() - began > SECONDS:
            self.model.stop_training = True
            faulthandler.dump_traceback_later(LATER, file=sys.__stderr__)
"""
_FIT = """
with labkit.QueueRunner(data.train_iterator, 32, 4) as runner:
    watch = labkit.watch(live=True)
    model.fit(runner.dataset(), steps_per_epoch=10**6, verbose=0, shuffle=False,
              callbacks=[watch, Until()])
    faulthandler.cancel_dump_traceback_later()
"""
_SEEN = """
import json, math

def row(samples):
    return [None if math.isnan(sample) else round(float(sample), 4) for sample in samples]

usage = sights[-1].usage
json.dumps({
    "machine": describe_machine(), "queue's limits": sights[-1].limits,
    "waiting share": sights[-1].waiting.share, "seconds": row(usage.seconds), "cpu": row(usage.cpu),
    "memory": usage.memory, "gpu": [row(gpu.utilisation) for gpu in usage.gpus],
    **{name: row(samples) for name, samples in usage.probes.items()},
})
"""


class Shown:
    """What a kernel sends for its cells."""

    def __init__(self) -> None:
        self.value, self.picture, self.pictures = "", b"", 0

    def keep(self, message: Any) -> None:
        kind, content = message["msg_type"], message["content"]
        if kind == "execute_result":
            self.value = content["data"]["text/plain"]
        elif kind == "update_display_data" and "image/png" in content["data"]:
            self.picture = base64.b64decode(content["data"]["image/png"])
            self.pictures += 1
        elif kind == "stream":
            print(content["text"], end="", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="The live view, as README shows it")
    parser.add_argument("--seconds", type=float, default=15.0)
    given = parser.parse_args()
    environment = {**os.environ, "PYTHONPATH": str(FIGURES.parent)}
    manager, client = start_new_kernel(kernel_name="python3", env=environment)
    shown = Shown()
    try:
        numbers = f"SECONDS, LATER = {given.seconds}, {_LATER}\n"
        for source in (numbers + _PREPARE, _FIT, _SEEN):
            reply = client.execute_interactive(source, output_hook=shown.keep, timeout=300)
            if reply["content"]["status"] != "ok":
                raise RuntimeError("\n".join(reply["content"]["traceback"]))
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    command = f"python -m tests.live_view --seconds {given.seconds:g}"
    kept = {"command": command, **json.loads(ast.literal_eval(shown.value))}
    if (late := kept["seconds"][-1] - given.seconds) > _LATER:
        raise RuntimeError(f"the view went on for {late:.1f} s after its fit was told to stop")
    (FIGURES / "live_view.png").write_bytes(shown.picture)
    (FIGURES / "live_view.json").write_text(json.dumps(kept, indent=1) + "\n")
    print(f"written: figures/live_view.png, the last of {shown.pictures} pictures")


if __name__ == "__main__":
    main()
