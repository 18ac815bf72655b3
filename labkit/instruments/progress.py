"""What a training run shows on the way: a bar, a line after each epoch, TensorBoard summaries."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from labkit.instruments.history import Epoch


def print_epoch(epoch: Epoch) -> None:
    """The article's two lines."""
    print(f"train/acc {epoch.train_accuracy:.4f}, train/loss {epoch.train_loss:.4f}")
    if epoch.valid_accuracy is not None:
        print(
            f"valid/acc {epoch.valid_accuracy:.4f}, valid/loss {epoch.valid_loss:.4f}", flush=True
        )


def summary_writers(log_dir: str | None, stack: ExitStack) -> list[Any]:
    """TensorBoard's writers for training and validation; none without a folder."""
    from labkit.quiet import tf

    writers = []
    for name in ("train", "valid") if log_dir else ():
        writers.append(tf.compat.v1.summary.FileWriter(str(Path(str(log_dir)) / name)))
        stack.callback(writers[-1].close)
    return writers


def summary_of(values: dict[str, Any]) -> Any:
    """TensorBoard's record of numbers by tag."""
    from labkit.quiet import tf

    summary = tf.compat.v1.Summary
    return summary(value=[summary.Value(tag=k, simple_value=v) for k, v in values.items()])


@contextmanager
def step_bar(steps: int, label: str, progress: bool) -> Iterator[Callable[[float, float], None]]:
    """A progress bar; what it gives is called after each step with accuracy and loss."""
    if not progress:
        yield lambda accuracy, loss: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=steps, desc=label, unit="step", mininterval=0.2) as bar:
        shown = 0.0

        def show(accuracy: float, loss: float) -> None:
            nonlocal shown
            # Ten times a second is all an eye can read; each redraw costs a notebook a message.
            if time.perf_counter() - shown > 0.1:
                scores = {"train_acc": f"{accuracy:.3f}", "train_loss": f"{loss:.3f}"}
                bar.set_postfix(scores, refresh=False)
                shown = time.perf_counter()
            bar.update()

        yield show
