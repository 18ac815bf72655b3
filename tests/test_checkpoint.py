"""train(checkpoint=...): a graph's training goes on where it was saved."""

import json

import pytest

from labkit import train
from labkit.cli import main

SETTINGS = {"n_workers": 2, "epochs": 2, "steps": 8, "delay": 0, "seed": 7, "capacity": 200,
            "min_after_dequeue": 100, "progress": False, "validate": True}  # fmt: skip


def at_step(number, happens):
    """As `on_start`: what happens behind a step."""

    def on_start(runner, timer):
        plain, steps = timer.run, iter(range(1, 1000))

        def run(*arguments):
            got = plain(*arguments)
            if next(steps) == number:
                happens()
            return got

        timer.run = run

    return on_start


def interrupt():
    raise KeyboardInterrupt


def die():
    raise OSError("as a power cut does, without a chance to save")


def losses(history):
    return [(epoch.valid_loss, epoch.valid_accuracy) for epoch in history.epochs]


def test_it_goes_on_after_an_interrupt_and_after_worse(small_mnist, tmp_path):
    undisturbed = train(order="fixed", **SETTINGS)
    run = {**SETTINGS, "checkpoint": tmp_path, "save_every": 2}
    with pytest.raises(OSError, match="power cut"):
        train(**run, on_start=at_step(6, die))
    assert json.loads((tmp_path / "state.json").read_text())["step"] == 4
    with pytest.raises(KeyboardInterrupt):
        train(**run, on_start=at_step(7, interrupt))
    assert json.loads((tmp_path / "state.json").read_text())["step"] == 3
    history = train(**run)
    assert losses(history) == losses(undisturbed)
    assert history.epochs[0].train_loss == pytest.approx(undisturbed.epochs[0].train_loss)
    assert history.epochs[0].steps == 8
    assert history.settings["order"] == "fixed"
    # What is complete is not trained any more.
    assert losses(train(**run)) == losses(undisturbed)


def test_in_any_order_too(small_mnist, tmp_path):
    run = {**SETTINGS, "n_workers": "auto", "order": "any", "validate": False, "epochs": 1}
    run |= {"checkpoint": tmp_path, "save_every": 2}
    with pytest.raises(OSError, match="power cut"):
        train(**run, on_start=at_step(6, die))
    state = json.loads((tmp_path / "state.json").read_text())
    assert (state["step"], state["runner"]["batches"], state["runner"]["order"]) == (4, 4, "any")
    history = train(**run)
    assert [epoch.steps for epoch in history.epochs] == [8]


def test_a_checkpoint_of_another_run_is_refused(small_mnist, tmp_path, capsys):
    run = {**SETTINGS, "checkpoint": tmp_path, "epochs": 1, "steps": 2, "validate": False}
    train(**run)
    for changed, says in (
        ({"learning_rate": 0.1}, "is of another run: learning_rate was 0.0001, and is 0.1"),
        ({"seed": 8}, "is of another run: .*seed was 7, and is 8"),
        ({"pipeline": "feed_dict"}, "pipeline must be 'queue' for a checkpoint"),
        ({"save_every": 0}, "save_every must be None or an integer >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=says):
            train(**{**run, **changed})
    with pytest.raises(SystemExit) as ended:
        main(["--checkpoint", str(tmp_path), "--steps", "3", "--delay", "0"])
    assert ended.value.code == 2
    assert "steps was 2, and is 3. Give the same settings" in capsys.readouterr().err
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(ValueError, match=r"state.json is damaged, or none of labkit's"):
        train(**run)
