"""labkit.keras.Resume: a fit that ended in the middle goes on there."""

import numpy as np
import pytest

import labkit.keras
from labkit import QueueRunner
from labkit.quiet import tf
from tests.benchmarks import resume

FIXED = {"batch_size": 6, "capacity": 60, "min_after_dequeue": 24, "order": "fixed", "seed": 1}


class StoppedError(Exception):
    pass


class StopAt(tf.keras.callbacks.Callback):
    """As if the kernel were killed behind so many calls."""

    def __init__(self, call):
        super().__init__()
        self.left = call

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if not self.left:
            raise StoppedError


def model(layers=1, execution=1, eager=True):
    tf.keras.utils.set_random_seed(1)
    dense = [tf.keras.layers.Dense(4, "tanh") for _ in range(layers)]
    dropout = tf.keras.layers.Dropout(0.3, seed=3)
    made = tf.keras.Sequential([*dense, dropout, tf.keras.layers.Dense(1)])  # built by its data
    made.compile("adam", "mse", metrics=["mae"], steps_per_execution=execution, run_eagerly=eager)
    return made


def factory(worker, n_workers, epoch, start=0):
    for number in range(start + worker, 20, n_workers):
        stream = np.random.SeedSequence([1, epoch], spawn_key=(number,))
        x = np.random.default_rng(stream).random((4, 3), np.float32)
        yield x, x.sum(1, keepdims=True)


def fitted(path, *callbacks, prefetch=0, repeat=False, steps=None, samples=None, **options):
    """Epochs, their figures and the weights at the end."""
    made = model(**options)
    with QueueRunner(factory, n_workers=2, samples=samples, **FIXED) as runner:
        data = runner.dataset()
        data = data.repeat() if repeat else data
        data = data.prefetch(prefetch) if prefetch else data
        last = [] if path is None else [labkit.keras.Resume(runner, path, 3)]
        history = made.fit(data, epochs=2, steps_per_epoch=steps, verbose=0, shuffle=False,
                           callbacks=[*callbacks, *last])  # fmt: skip
    return history.epoch, history.history, [weight.tolist() for weight in made.get_weights()]


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
@pytest.mark.parametrize(
    ("stop_at", "options"),
    [
        (20, {}),  # of an unknown length: 14 and 14 steps
        pytest.param(
            5,
            {"execution": 4, "eager": False, "prefetch": 4, "samples": 80},
            marks=pytest.mark.slow,
        ),
        pytest.param(  # passes end in epochs
            13, {"repeat": True, "steps": 9, "samples": 80, "prefetch": 2}, marks=pytest.mark.slow
        ),
    ],
)
def test_what_was_stopped_goes_on_at_the_same_step(tmp_path, stop_at, options):
    undisturbed = fitted(None, **options)
    path = tmp_path / "of" / "state"
    with pytest.raises(StoppedError):
        fitted(path, StopAt(stop_at), **options)
    assert [file.name for file in path.parent.iterdir()] == ["state"]
    assert fitted(path, **options) == undisturbed
    assert not path.exists()


@pytest.mark.slow  # three programs that start Keras
def test_a_training_that_is_killed_goes_on(tmp_path):
    """SIGKILL comes at any moment. tests/benchmarks/resume.py does it with several devices, too."""
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    resume.run(killed, "prefetch", kill_at=int(np.random.default_rng().integers(1, 70)))
    resume.run(killed, "prefetch", undisturbed=undisturbed)
    assert not resume.differences(killed, undisturbed)


def test_in_any_order_each_sample_is_trained_on_once_an_epoch(tmp_path):
    path, any_order = tmp_path / "state", {**FIXED, "order": "any"}
    seen = []  # the first number of each sample of each step

    def loss(y, predicted):
        if tf.executing_eagerly():  # and not only built
            seen.append(y.numpy()[:, 0].tolist())
        return tf.reduce_mean((y - predicted) ** 2, axis=-1)

    def fit(*callbacks):
        made = model()
        made.compile("adam", loss, steps_per_execution=2, run_eagerly=True)
        with QueueRunner(factory, n_workers=2, samples=80, **any_order) as runner:
            last = labkit.keras.Resume(runner, path, 3)
            data = runner.dataset().prefetch(4)
            made.fit(data, epochs=2, verbose=0, shuffle=False, callbacks=[*callbacks, last])

    with pytest.raises(StoppedError):
        fit(StopAt(6))
    kept = labkit.keras._load(path)[0]["runner"]["batches"]
    assert 0 < kept < len(seen) == 12
    del seen[kept:]
    fit()
    steps, each = [seen[:14], seen[14:]], [factory(0, 1, epoch) for epoch in range(2)]
    assert [len(epoch) for epoch in steps] == [14, 14]
    for epoch, batches in zip(steps, each, strict=True):
        made = np.concatenate([y[:, 0] for _, y in batches])
        assert sorted(np.concatenate(epoch)) == sorted(made)


class InTheWay(tf.keras.callbacks.Callback):
    def on_train_batch_begin(self, batch, logs=None):
        if self.model.train_function.__class__.__name__ == "Tap":
            self.model.train_function = self.model.train_function.inner


def test_what_cannot_go_on_is_refused(tmp_path):
    with QueueRunner(factory) as runner:
        runner.dataset()
        with pytest.raises(ValueError, match=r"Resume: nobody knows .* once ahead of dataset"):
            labkit.keras.Resume(runner, tmp_path / "state")
    runner = QueueRunner(factory, n_workers=2, **FIXED)
    with pytest.raises(ValueError, match="save_freq must be 'epoch' or an integer >= 1, got 0"):
        labkit.keras.Resume(runner, tmp_path / "state", 0)
    path = tmp_path / "state"
    with pytest.raises(StoppedError):
        fitted(path, StopAt(4))
    with pytest.raises(ValueError, match="is of another model or optimizer"):
        fitted(path, layers=2)
    with runner, pytest.raises(RuntimeError, match="Put Resume at the end of the list"):
        resume_it = labkit.keras.Resume(runner, path)
        model().fit(runner.dataset(), verbose=0, callbacks=[resume_it, InTheWay()])
    path.write_text("nothing of the kind")
    with pytest.raises(ValueError, match="is no file of Resume's, or damaged"):
        fitted(path)
