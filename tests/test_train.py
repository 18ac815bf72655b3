"""train() and its command: what they measure, keep, print, refuse and leave off the screen."""

import json
import math
import os
import re
import subprocess
import sys
from itertools import islice

import numpy as np
import pytest

import labkit
from labkit import MnistDataGenerator, WorkerError
from labkit.cli import main
from labkit.instruments.progress import Forecast
from labkit.settings import check_settings
from labkit.train import Epoch, History, _Run, train

# A queue that fills in a few batches, so that a run takes a second.
QUICK = {
    "steps": 4,
    "epochs": 1,
    "delay": 0.0,
    "capacity": 128,
    "min_after_dequeue": 32,
    "progress": False,
}
FLAGS = ["--steps", "3", "--epochs", "2", "--delay", "0", "--capacity", "128"]
FLAGS += ["--min_after_dequeue", "32"]


@pytest.fixture(autouse=True)
def few_digits(small_mnist):
    return small_mnist


@pytest.fixture
def history():
    epochs = [Epoch(2.0, 10, 1.5, 0.4, 0.7, 1.1, 0.8, 0.9), Epoch(1.0, 10, 0.5, 0.4, 0.8, 0.6)]
    return History(
        {"pipeline": "queue", "n_workers": 4},
        {"processor": "x", "cores": 2, "tensorflow": "2"},
        epochs,
        0.75,
        [(0.15, 0.04), (0.05, 0.04)],
    )


# -- what it returns -----------------------------------------------------------------------------


@pytest.mark.parametrize("pipeline", ["feed_dict", "queue", "constant"])
def test_each_epoch_is_told_in_full(pipeline):
    result = train(pipeline, **{**QUICK, "epochs": 2})
    assert len(result.epochs) == 2 and len(result.steps) == 4
    for epoch in result.epochs:
        assert epoch.steps == 4
        assert epoch.steps_per_second == pytest.approx(4 / epoch.seconds)
        assert 0 <= epoch.train_accuracy <= 1 and 0 <= epoch.valid_accuracy <= 1
        assert epoch.train_loss > 0 and epoch.valid_loss > 0
        # Accuracy over 200 digits and 4 x 32 samples: whole numbers of them are right.
        for right in (epoch.valid_accuracy * 200, epoch.train_accuracy * 128):
            assert right == pytest.approx(round(right), abs=1e-2)
    assert result.settings["pipeline"] == pipeline and result.settings["steps"] == 4
    assert {"processor", "cores", "python", "tensorflow", "numpy"} <= set(result.machine)
    assert result.start_seconds > 0


def test_waiting_and_computing_make_up_the_epoch_and_a_queue_with_threads_waits_less():
    setup = {**QUICK, "steps": 30, "delay": 0.05, "validate": False}
    serial, queued = (train("feed_dict", **setup), train("queue", 6, **setup))
    for result in (serial, queued):
        (epoch,) = result.epochs
        assert epoch.waiting + epoch.computing == pytest.approx(epoch.seconds, rel=0.05)
        assert epoch.waiting > 0 and epoch.computing > 0
        assert sum(wait for wait, _ in result.steps) == pytest.approx(epoch.waiting)
        assert sum(compute for _, compute in result.steps) == pytest.approx(epoch.computing)
    # feed_dict waits for as long as its generator sleeps.
    assert 30 * 0.05 <= serial.epochs[0].waiting < 1.4 * 30 * 0.05
    # The article's whole point, as a ratio with much room: 6 sleepers against one.
    assert queued.epochs[0].waiting < 0.6 * serial.epochs[0].waiting


def test_a_constant_batch_is_never_waited_for():
    (epoch,) = train("constant", **{**QUICK, "delay": 0.5, "validate": False}).epochs
    assert epoch.waiting == 0 and epoch.computing > 0
    assert epoch.valid_accuracy is None and epoch.valid_loss is None


def test_the_seed_fixes_weights_and_order():
    def losses(seed):
        run = train("feed_dict", seed=seed, **QUICK)
        return [run.epochs[0].train_loss, run.epochs[0].valid_loss]

    assert losses(3) == pytest.approx(losses(3), rel=1e-5)
    assert losses(3) != pytest.approx(losses(4), rel=1e-3)


def test_training_learns():
    setup = {**QUICK, "steps": 60, "epochs": 2, "learning_rate": 3e-3}
    first, last = train("queue", 2, **setup).epochs
    assert last.train_loss < first.train_loss and last.valid_accuracy > 0.5


def test_any_iterator_of_batches_will_do(small_mnist):
    seen = []

    def mine(worker, n_workers):
        data = MnistDataGenerator(20, data=small_mnist)
        for batch in islice(data.epoch_iterator(worker, n_workers), 50):
            seen.append(worker)
            yield batch

    result = train("queue", 2, iterator=mine, **{**QUICK, "steps": 100, "epochs": 3})
    # 600 samples are 18 batches of 32 and one of 24; then the data are at their end.
    assert [epoch.steps for epoch in result.epochs] == [19]
    assert set(seen) == {0, 1} and "mine" in result.settings["iterator"]


@pytest.mark.parametrize("pipeline", ["feed_dict", "queue"])
def test_a_failing_generator_ends_the_training(pipeline, small_mnist):
    def faulty():
        yield from islice(MnistDataGenerator(32, data=small_mnist).train_iterator(), 5)
        raise OSError("no disk")

    expected = WorkerError if pipeline == "queue" else OSError
    with pytest.raises(expected, match="no disk"):
        train(pipeline, iterator=faulty, **{**QUICK, "steps": 100})


def test_an_interrupt_leaves_nothing_running_and_the_call_works_again():
    def interrupt(runner, timer):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train("queue", 3, on_start=interrupt, **QUICK)
    assert train("queue", 3, **QUICK).epochs[0].steps == 4


def test_on_start_gets_the_running_runner_and_the_timer():
    got = []
    train("queue", on_start=lambda runner, _: got.append((runner, runner.depth() >= 0)), **QUICK)
    train("feed_dict", on_start=lambda *both: got.append(both), **QUICK)
    assert got[0][0].batch_size == 32 and got[0][1] and got[1][0] is None
    # QUICK's generator costs nothing, but taking its batch is waiting all the same.
    assert 0 < got[1][1].recent_waiting() < 1
    assert math.isnan(got[1][1].recent_waiting())  # no step since


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"pipeline": "tfrecord"}, "pipeline.*tfrecord"),
        ({"workers": "actor"}, "workers.*actor"),
        ({"n_workers": 0}, "n_workers.*0"),
        ({"n_workers": "many"}, "n_workers.*'auto'.*many"),
        ({"log_dir": __file__}, "log_dir.*folder.*test_train"),
        ({"n_threads": 0}, "n_workers.*0"),
        ({"epochs": 0}, "epochs.*0"),
        ({"steps": 1.5}, r"steps.*1\.5"),
        ({"batch_size": 0}, "batch_size.*0"),
        ({"delay": -1}, "delay.*-1"),
        ({"delay": float("nan")}, "delay.*nan"),
        ({"learning_rate": float("inf")}, "learning_rate.*inf"),
        ({"capacity": 33}, "capacity.*64.*33"),
        ({"min_after_dequeue": -1}, "min_after_dequeue"),
        ({"seed": -1}, "seed.*-1"),
    ],
)
def test_wrong_settings_are_refused_by_name(wrong, named):
    with pytest.raises(ValueError, match=named):
        train(**{**QUICK, **wrong})


# -- History as JSON -----------------------------------------------------------------------------


def test_a_history_comes_back_as_it_was(history, tmp_path):
    history.save(tmp_path / "run.json")
    assert History.load(tmp_path / "run.json") == history
    assert History.load(str(tmp_path / "run.json")).epochs[0].steps_per_second == 5.0
    data = json.loads((tmp_path / "run.json").read_text())
    del data["complete"]  # a file of before there was this
    (tmp_path / "old.json").write_text(json.dumps(data))
    assert History.load(tmp_path / "old.json") == history


def test_numpy_integers_as_settings_can_be_saved(tmp_path):
    # train takes them, as from np.arange in a notebook's sweep.
    numbers = {"steps": np.int64(2), "seed": np.int32(3), "delay": np.float32(0)}
    result = train("constant", **{**QUICK, **numbers, "validate": False})
    result.save(tmp_path / "run.json")
    assert History.load(tmp_path / "run.json").epochs == result.epochs


def test_the_saved_file_is_plain_json_with_the_rate(history, tmp_path):
    history.save(tmp_path / "run.json")
    data = json.loads((tmp_path / "run.json").read_text())
    assert data["epochs"][0]["steps_per_second"] == 5.0
    assert data["epochs"][1]["valid_accuracy"] is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no json",
        "[]",
        "{}",
        "3",
        '{"epochs": [1]}',
        '{"epochs": []}',
        '{"epochs": 1}',
        '{"epochs": [{"steps_per_second": 1, "colour": 2}], "steps": []}',
    ],
)
def test_another_file_is_refused_by_name(tmp_path, text):
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(ValueError, match=r"other\.json"):
        History.load(tmp_path / "other.json")


def test_a_missing_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        History.load(tmp_path / "none.json")


# -- TensorBoard ---------------------------------------------------------------------------------


def test_log_dir_keeps_training_and_validation_apart_and_the_history_comes_back(tmp_path):
    from labkit.quiet import tf

    result = train("queue", log_dir=tmp_path, **{**QUICK, "epochs": 2})
    result.save(tmp_path / "run.json")
    assert History.load(tmp_path / "run.json") == result

    def scalars(name):
        (file,) = (tmp_path / name).glob("events.out.tfevents.*")
        return [
            (event.step, value.tag, value.simple_value)
            for event in tf.compat.v1.train.summary_iterator(str(file))
            for value in event.summary.value
        ]

    # One point per 50 steps, so here one per epoch; the same tags, to be drawn in one chart.
    assert [row[0] for row in scalars("train")] == [0, 0, 4, 4]
    valid = scalars("valid")
    assert {tag for _, tag, _ in valid} == {tag for _, tag, _ in scalars("train")}
    losses = [value for _, tag, value in valid if "loss" in tag]
    assert losses == pytest.approx([epoch.valid_loss for epoch in result.epochs])


# -- the command ---------------------------------------------------------------------------------


def test_it_prints_its_plan_and_each_epochs_lines_and_writes_json_and_plot(capsys, tmp_path):
    json_file, plot_file = tmp_path / "run.json", tmp_path / "run.png"
    flags = ["--n_thread", "2", *FLAGS, "--json", str(json_file), "--plot", str(plot_file)]
    assert main(flags) == 0
    result = History.load(json_file)
    assert len(result.epochs) == 2 and result.settings["n_workers"] == 2 and result.complete
    assert result.settings["command"].startswith("python -m labkit.train --n_thread 2 --steps 3")
    assert plot_file.read_bytes().startswith(b"\x89PNG")
    out, err = capsys.readouterr()
    number = r"\d+\.\d+"
    lines = ["pipeline queue, 2 threads, 2 epochs of 3 steps of 32 samples"]
    for epoch in (1, 2):
        spent = rf"{number} s, {number} steps/s, \d+% of it waiting for data"
        lines += [rf"epoch {epoch}/2: {spent}"]
        lines += [rf"{part}/acc {number}, {part}/loss {number}" for part in ("train", "valid")]
    shown = out.splitlines()
    assert len(shown) == len(lines)
    assert all(re.fullmatch(want, got) for want, got in zip(lines, shown, strict=True)), out
    # The bar, on stderr where it does not get into a pipe.
    assert "train_acc=" in err and "train_loss=" in err and "epoch 2/2" in err


def test_the_number_of_workers_may_be_auto(capsys, tmp_path):
    assert main(["--n_thread", "auto", *FLAGS, "--json", str(tmp_path / "run.json")]) == 0
    assert capsys.readouterr().out.startswith("pipeline queue, as many threads as it takes, 2 ep")
    assert History.load(tmp_path / "run.json").settings["n_workers"] == "auto"


PLAN = {"pipeline": "queue", "n_workers": 4, "epochs": 10, "steps": 1875, "batch_size": 32}
PLAN |= {"capacity": 2000, "min_after_dequeue": 1000, "validate": False}


@pytest.mark.parametrize(
    ("changed", "said_after", "said"),
    [
        # 96 batches may lie ready, which come at 1024 steps/s; then 16 steps/s for 2 s.
        ({}, 96 + 32, "about 19 min more at 16.0 steps/s (as in steps 97 to 128)"),
        ({"n_workers": 16}, 96 + 64, "about 19 min more at 16.0 steps/s (as in steps 97 to 160)"),
        ({"n_workers": "auto"}, None, None),
        (
            {"pipeline": "feed_dict", "epochs": 1, "validate": True},
            33,
            "steps 2 to 33), and the time of",
        ),
        ({"pipeline": "constant", "steps": 10**5}, 33, "about 17 h more at 16.0 steps/s"),
    ],
)
def test_the_expected_time_is_that_of_steps_which_the_workers_had_not_ready(
    changed, said_after, said
):
    forecast = Forecast({**PLAN, **changed})
    now, told = 0.0, {}
    for step in range(1, 500):
        ready = step <= 96 and changed.get("pipeline", "queue") == "queue"
        now += 2**-10 if ready else 2**-4
        if text := forecast.after_step(now):
            told[step] = text
    assert len(told) == (said is not None)
    for step, text in told.items():
        assert step == said_after and said in text


def test_it_runs_another_pipeline(capsys):
    assert main(["--pipeline", "feed_dict", *FLAGS]) == 0
    out = capsys.readouterr().out
    assert out.count("valid/acc") == 2 and out.startswith("pipeline feed_dict, ")


CTRL_C = KeyboardInterrupt(), 130, "interrupted; the workers are stopped."
FAILURE = WorkerError("worker 0 fell."), 1, "worker 0 fell."


@pytest.mark.parametrize(
    ("stops", "code", "said", "steps"),
    [(*CTRL_C, 0), (*CTRL_C, 2), (*CTRL_C, 5), (*FAILURE, 0), (*FAILURE, 5)],
)
def test_what_was_measured_before_the_end_is_shown_and_kept(
    stops, code, said, steps, capsys, tmp_path, monkeypatch
):
    step, left = _Run._step, iter(range(steps))

    def step_or_stop(self, **options):
        if next(left, None) is None:
            raise stops
        return step(self, **options)

    monkeypatch.setattr(_Run, "_step", step_or_stop)
    json_file, plot_file = tmp_path / "run.json", tmp_path / "run.png"
    json_file.write_text("of an earlier run")
    assert main([*FLAGS, "--json", str(json_file), "--plot", str(plot_file)]) == code
    out, err = capsys.readouterr()
    kept = f" What was measured until then is in {json_file}." if steps else ""
    assert err.endswith(f"python -m labkit.train: {said}{kept}\n")
    if not steps:
        assert json_file.read_text() == "of an earlier run" and not plot_file.exists()
        return
    result = History.load(json_file)
    assert not result.complete and json.loads(json_file.read_text())["complete"] is False
    assert [epoch.steps for epoch in result.epochs] == ([2] if steps == 2 else [3, 2])
    assert len(result.steps) == 2 and plot_file.exists()
    assert f"epoch {len(result.epochs)}/2, 2 of 3 steps: " in out


def test_the_disk_that_is_full_at_the_end_is_told_in_one_line(capsys, tmp_path, monkeypatch):
    def full(self, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(History, "save", full)
    assert main([*FLAGS, "--pipeline", "constant", "--json", str(tmp_path / "run.json")]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("python -m labkit.train: What was measured could not be written: ")


ALL_FLAGS = [
    "n_thread", "pipeline", "workers", "epochs", "steps", "batch_size", "delay", "learning_rate",
    "capacity", "min_after_dequeue", "seed", "order", "log_dir", "json", "plot", "version",
    "checkpoint", "save_every",
]  # fmt: skip


def test_help_explains_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    parts = dict(re.findall(r"(?ms)^  --(\w+)(.*?)(?=^  -|\Z|^\S)", text))
    # Lines are broken to the terminal's width, and that is not the point here.
    parts = {flag: " ".join(explained.split()) for flag, explained in parts.items()}
    assert set(ALL_FLAGS) == set(parts)
    for flag, explained in parts.items():
        # Every number has its unit or says that it has none; every path says that it is one.
        unit = r"COUNT|SECONDS|SAMPLES|INTEGER|no unit|DIR|FILE|\{.*,.*\}"
        assert flag == "version" or re.search(unit, explained), flag
        without = ("log_dir", "json", "plot", "version", "checkpoint", "save_every")
        assert ("(default: " in explained) == (flag not in without)
        assert "None" not in explained
    assert "(default: 0.05)" in parts["delay"] and "(default: 1875)" in parts["steps"]
    assert text.index("the model:\n") < text.index("training:\n") < text.index("is kept:\n")


def test_the_version_is_the_packages(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"labkit {labkit.__version__}\n"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--n_threads", "4"], "unknown flag --n_threads, did you mean --n_thread?"),
        (["--batch-size=8"], "unknown flag --batch-size, did you mean --batch_size?"),
        (["--json", "x" * 300], "expected a file that can be written, got xxx"),
        (["--zzz"], "unknown flag --zzz ("),
        (["4"], "expected flags only, got '4'"),
        (["--n_thread", "many"], "expected a count or auto, got 'many'"),
        (["--n_workers", "0"], "n_thread must be 'auto' or an integer >= 1, got 0"),
        (["--log_dir", __file__ + "/log"], "log_dir must be a folder that can be written to, got"),
    ],
)
def test_a_wrong_flag_is_told_with_the_right_one(flags, said, capsys):
    with pytest.raises(SystemExit):
        main(flags)
    assert said in capsys.readouterr().err


def test_a_pipe_is_no_file_to_try(capsys, tmp_path):
    os.mkfifo(tmp_path / "pipe")  # to open it would wait for a reader
    with pytest.raises(SystemExit):
        main(["--json", str(tmp_path / "pipe"), "--epochs", "0"])
    assert "epochs must be" in capsys.readouterr().err


def test_large_batches_need_no_sizes_of_the_queue():
    settings = {**PLAN, "workers": "thread", "delay": 0.0, "learning_rate": 0.1, "seed": 0}
    settings |= {
        "order": "any",
        "batch_size": 1024,
        "capacity": None,
        "min_after_dequeue": None,
        "log_dir": None,
        "checkpoint": None,
        "save_every": None,
    }
    check_settings(settings)
    assert settings["capacity"] >= settings["min_after_dequeue"] + 1024


@pytest.mark.parametrize(
    "flags",
    [
        ["--n_thread", "0"],
        ["--n_thread", "two"],
        ["--pipeline", "tfrecord"],
        ["--workers", "actor"],
        ["--epochs", "-1"],
        ["--steps", "0"],
        ["--batch_size", "0"],
        ["--batch_size", "70000", "--capacity", "100000"],
        ["--delay", "-0.1"],
        ["--delay", "nan"],
        ["--learning_rate", "inf"],
        ["--capacity", "1000"],
        ["--capacity", "100000000000000"],  # petabytes
        ["--min_after_dequeue", "-5"],
        ["--seed", "-1"],
        ["--json", "no/such/folder/x.json"],
        ["--json", "."],
        ["--plot", "no/such/folder/x.png"],
        ["--plot", "x.docx"],
        ["--plot", "folder.png"],
        ["--log_dir", "a_file"],
        ["--log_dir", "a_file/log"],
        ["--no_such_flag"],
    ],
    ids=" ".join,
)
def test_a_wrong_value_gets_one_line_and_exit_code_2(flags, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "a_file").write_text("")
    with pytest.raises(SystemExit) as ended:
        main([*FLAGS[:6], *flags])
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    # That so much memory is not there is found after the plan is told.
    assert (
        out.count("\n") == (flags[-1] == "100000000000000")
        and err.count("\n") == 1
        and err.endswith("\n")
    )
    assert err.startswith("python -m labkit.train: ")
    assert flags[0].lstrip("-") in err


def test_a_failed_worker_is_told_and_the_command_returns_1(capsys, monkeypatch):
    def broken(self, *args):
        raise OSError("no disk")
        yield

    monkeypatch.setattr(MnistDataGenerator, "passes_iterator", broken)
    assert main(FLAGS) == 1
    assert "worker 0 raised OSError: no disk" in capsys.readouterr().err


def test_help_comes_without_tensorflow():
    program = (
        "import runpy, sys\n"
        "sys.argv = ['labkit.train', '--help']\n"
        "try:\n    runpy.run_module('labkit.train', run_name='__main__')\n"
        "except SystemExit as ended:\n    print('code', ended.code)\n"
        "print(sorted({'tensorflow', 'keras', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.endswith("code 0\n[]\n") and done.stderr == ""


def test_the_screen_shows_the_bar_and_nothing_of_tensorflows_start():
    command = [sys.executable, "-m", "labkit.train", *FLAGS, "--epochs", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown = [line for line in re.split(r"[\r\n]+", done.stderr) if line.strip()]
    assert shown and all(line.startswith("epoch 1/1") for line in shown), done.stderr
    first = [line.split()[0] for line in done.stdout.splitlines()]
    assert first == ["pipeline", "epoch", "train/acc", "valid/acc"]
