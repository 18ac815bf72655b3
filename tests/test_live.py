"""The live picture and the magics: they show what is true, end with the run, and harm nothing."""

import io
import math
import threading

import numpy as np
import pytest
from IPython.core.interactiveshell import InteractiveShell
from jupyter_client.manager import start_new_kernel
from traitlets.config import Config

import labkit
from labkit import QueueRunner, StepTimer
from labkit.instruments import live
from labkit.instruments.fits import fits_watched
from labkit.instruments.picture import Picture
from labkit.instruments.usage_monitor import Gpu
from labkit.instruments.waiting import Counted, RecentWaiting, Waiting
from labkit.instruments.watch_fit import FitWatch
from labkit.quiet import tf
from tests.figure_texts import boxes, cut, overlapping
from tests.programs import ROOT

X = np.zeros((40, 2), np.float32)


def new_model():
    model = tf.keras.Sequential([tf.keras.Input((2,)), tf.keras.layers.Dense(1)])
    model.compile("sgd", "mse", run_eagerly=True)  # nothing to trace: quick
    return model


def fit(model=None, **options):
    return (model or new_model()).fit(X, X[:, :1], 4, verbose=0, **options)


def endless():
    while True:
        yield X[:4], X[:4, :1]


class Recorder:
    """A screen that keeps what is shown: the line, and whether it was the last."""

    def __init__(self, error=None):
        self.shown, self.error = [], error

    def show(self, sight, ended):
        if self.error:
            raise self.error
        self.shown.append((sight.text(), ended))


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(live, "screen", lambda: recorder)
    return recorder


def await_the_end():
    """Of a live picture that nobody ended: it sees by itself that its run is over."""
    for thread in threading.enumerate():
        if thread.name == "labkit live":
            thread.join(60)
            assert not thread.is_alive()


def ends(recorder):
    return [ended for _, ended in recorder.shown].count(True)


# -- when it begins and ends -----------------------------------------------------------------------


def test_a_fit_is_shown_until_its_end(recorder, capsys):
    kept = labkit.watch(live=True)
    fit(epochs=2, callbacks=[kept])
    fit(callbacks=[kept])
    assert ends(recorder) == 2 and recorder.shown[-1][1]
    assert f"{kept.epochs[0].share:.0%} waiting for data" in recorder.shown[-1][0]


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()])
def test_a_fit_that_fails_is_over_too(recorder, error):
    def fail(epoch, logs):
        raise error

    failing = tf.keras.callbacks.LambdaCallback(on_epoch_begin=fail)
    kept = labkit.watch(live=True)
    with pytest.raises(type(error)):
        fit(callbacks=[kept, failing])
    await_the_end()
    assert ends(recorder) == 1


def test_a_loop_is_shown_and_one_that_is_left_too(recorder, capsys):
    assert list(labkit.watch([1, 2], live=True)) == [1, 2]
    for _ in labkit.watch([1, 2], live=True):
        break
    assert ends(recorder) == 2


def test_a_runner_is_shown_until_it_stops(recorder):
    with QueueRunner(endless, 4, capacity=40, min_after_dequeue=8) as runner:
        seen = runner.watch().sight
        history = new_model().fit(runner.dataset(), steps_per_epoch=10, verbose=0, shuffle=False)
    await_the_end()
    text, ended = recorder.shown[-1]
    assert ended and ends(recorder) == 1
    assert not math.isnan(seen.waiting.share) and "waiting for data" in text
    assert list(history.history) == ["loss"]


def test_the_queue_is_shown_against_its_limits():
    with QueueRunner(endless, 4, capacity=40, min_after_dequeue=8) as runner:
        next(iter(runner.dataset()))
        sight = live.Sight()  # finds the runner by itself
        with sight:
            pass
        assert sight.limits == (8, 40)
        assert 0 <= sight.usage.probes["queue"][-1] <= 40
        assert "(8 to 40)" in sight.text()
        with QueueRunner(endless, 4, capacity=60, min_after_dequeue=8) as later:
            next(iter(later.dataset()))
            with live.Sight() as sight:
                pass
            assert sight.limits == (8, 40)  # the validation's begins later


def test_a_block_ends_it_and_a_second_end_does_nothing(recorder):
    with QueueRunner(endless, 4).watch() as shown:
        pass
    shown.end()
    assert ends(recorder) == 1


def test_what_cannot_be_drawn_leaves_the_training_alone(recorder):
    recorder.error = OSError("no room")
    with pytest.warns(RuntimeWarning, match=r"OSError: no room. The training goes on"):
        history = fit(callbacks=[labkit.watch(live=True)])
    assert len(history.history["loss"]) == 1


@pytest.mark.parametrize(("cost", "seconds"), [(0.0, 1.0), (0.03, 2.0), (0.3, 5.0)])
def test_what_costs_more_is_drawn_less_often(cost, seconds):
    assert live.pause(cost) == pytest.approx(seconds)


# -- where it is shown -----------------------------------------------------------------------------


class Tty(io.StringIO):
    def isatty(self):
        return True


def seen_sight(gpus=0, waiting=0.25, queue=1016.0):
    """A Sight as after a run of 100 s."""
    sight, number = live.Sight(), 1000
    usage = sight.usage
    usage.seconds = [0.1 * (n + 1) for n in range(number)]
    usage.cpu, usage.memory = [50.0] * number, [2e9] * number
    usage.probes.update(waiting=[waiting] * number, queue=[queue] * number)
    usage.gpus = [Gpu(n, "H100", 8e10, [10.0 * n] * number) for n in range(gpus)]
    if not math.isnan(waiting):
        sight.waiting._began, sight.waiting._seen = (0.0, 0.0), (25.0, 100.0)
    if not math.isnan(queue):
        sight.limits = 1000, 2000
    return sight


WHOLE = "labkit: 100 s, 25% waiting for data, queue 1016 (1000 to 2000), CPU 50%, GPU 0 0%"


def test_in_a_terminal_it_is_one_line_that_the_next_output_replaces(monkeypatch):
    out = Tty()
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setenv("COLUMNS", "120")
    screen = live.screen()
    for ended in (False, False, True):
        screen.show(seen_sight(1), ended)
    assert out.getvalue() == f"\r\x1b[K{WHOLE}\r" * 2 + f"\r\x1b[K{WHOLE}\n"


def test_in_a_pipe_there_is_only_the_last_line(capsys):
    screen = live.screen()
    for ended in (False, False, True):
        screen.show(seen_sight(1), ended)
    assert capsys.readouterr().out == f"{WHOLE}\n"


def test_what_was_not_there_is_not_told():
    assert seen_sight(0, math.nan, math.nan).text() == "labkit: 100 s, CPU 50%"
    assert live.Sight().text() == "labkit: 0 s"
    assert seen_sight(8).text().endswith("CPU 50%, 8 GPUs 35%")


@pytest.mark.parametrize(
    ("sight", "titles"),
    [
        (lambda: live.Sight(), ["CPU (%)", "memory (GB)"]),
        (lambda: seen_sight(), ["CPU (%)", "memory (GB)"]),
        (lambda: seen_sight(8), ["queue (samples)", "CPU (%)", "GPUs (%)", "memory (GB)"]),
    ],
)
def test_the_picture_has_a_panel_for_what_there_is_and_nothing_is_cut(sight, titles):
    picture, sight = Picture(), sight()
    for ended in (False, False, True):  # made, drawn anew, made for what it has become
        assert picture.png(sight, sight.text(), ended).startswith(b"\x89PNG")
        figure = picture.figure
        *words, last = [text.get_text() for text in figure.texts]
        assert [word for word in words if word.endswith(")")][-len(titles) :] == titles
        assert last == sight.text()
        found = boxes(figure)
        assert not cut(figure, found) and not overlapping(found)


@pytest.mark.parametrize(
    ("seconds", "label"),
    [(21.5, "21.5 s"), (999.4, "999 s"), (1234.5, "20.6 min"), (86_400, "24 h")],
)
def test_the_time_of_a_long_run_has_room(seconds, label):
    picture, sight = Picture(), seen_sight(1)
    sight.usage.seconds = list(np.linspace(0, seconds, len(sight.usage.cpu)))
    picture.png(sight, sight.text(), ended=True)
    found = boxes(picture.figure)
    ends = [box for words, box in found.items() if words.split(" ", 1)[1] == label]
    assert len(ends) == 5 and max(box.x1 for box in ends) < picture.figure.bbox.width - 10
    assert not cut(picture.figure, found) and not overlapping(found)


def heights(figure, title):
    """Where the lines of a panel are, by the labels beside it: from 0, the lowest, to 1."""
    (head,) = [text for text in figure.texts if text.get_text() == title]
    left = head.get_position()[0]
    ticks = [t.get_position()[1] for t in figure.texts if t.get_position()[0] == left - 5]
    lines = [line for line in figure.artists if left <= min(line.get_xdata()) < left + 200]
    data = [np.asarray(line.get_ydata()) for line in lines if len(line.get_xdata()) > 3]
    return [np.unique(np.round((y - min(ticks)) / (max(ticks) - min(ticks)), 3)) for y in data]


def test_lines_are_true_however_long_the_run_was():
    sight = seen_sight(2, queue=500.0)
    sight.usage.cpu[:500] = [math.nan] * 500
    picture = Picture()
    picture.png(sight, "", True)
    figure = picture.figure
    assert heights(figure, "waiting for data (%)") == [0.25]
    assert heights(figure, "queue (samples)") == [0.25]  # of the capacity
    assert heights(figure, "CPU (%)") == [0.5]
    assert heights(figure, "GPUs (%)") == [0.0, 0.1]
    assert heights(figure, "memory (GB)") == [1.0]
    assert max(len(line.get_xdata()) for line in figure.artists) <= 300


# -- waiting, whoever measures it ------------------------------------------------------------------


def test_waiting_is_of_all_that_measure_it_since_the_last_look():
    Counted().add(1, 8.0, 8.0, 8.0)  # before: does not count
    probe = RecentWaiting()
    assert math.isnan(probe()) and math.isnan(probe.share)
    Counted().add(1, 4.0, 3.0, 4.0)
    Counted().add(1, 4.0, 1.0, 4.0)
    assert probe() == pytest.approx(0.5)
    Counted().add(1, 2.0, 0.0, 2.0)
    Waiting().add(1, 9.0, 9.0, 9.0)  # a sum of what was counted already
    slowed = Counted(slow=1.0)
    assert probe() == pytest.approx(0.0) and probe.share == pytest.approx(0.4)
    slowed.add(1, 2.0, 1.0, 2.0)
    assert probe() == pytest.approx(1.0)  # waiting, and a slower step


def test_a_step_timer_counts():
    class Session:
        def run(self, fetches, feed_dict):
            return fetches

    timer, probe = StepTimer(), RecentWaiting()
    with timer.waiting():
        pass
    timer.run(Session(), 7)
    assert 0 < probe() < 1


def test_a_fit_in_the_block_is_watched_and_says_nothing(capsys):
    own, probe = tf.keras.Model.fit, RecentWaiting()
    with fits_watched(), fits_watched():
        history = fit(callbacks=[tf.keras.callbacks.Callback()])
        fit()
        probe()
    assert not math.isnan(probe.share) and list(history.history) == ["loss"]
    assert tf.keras.Model.fit is own and not capsys.readouterr().out


@pytest.fixture
def watches(monkeypatch):
    """Those that begin with a fit."""
    begun, begin = [], FitWatch.on_train_begin
    monkeypatch.setattr(
        FitWatch, "on_train_begin", lambda self, logs=None: begun.append(self) or begin(self)
    )
    return begun


def test_a_fit_that_has_a_watch_gets_no_second(watches):
    kept = labkit.watch()
    with fits_watched():
        fit(callbacks=[kept])
    assert watches == [kept]


def test_who_wraps_fit_meanwhile_is_left_as_it_is(monkeypatch, watches):
    monkeypatch.setattr(tf.keras.Model, "fit", tf.keras.Model.fit)  # put back at the end
    with fits_watched():
        ours = tf.keras.Model.fit

        def theirs(*args, **options):
            return ours(*args, **options)

        tf.keras.Model.fit = theirs
    assert tf.keras.Model.fit is theirs
    fit()
    assert not watches


# -- in IPython ------------------------------------------------------------------------------------


@pytest.fixture
def shell(monkeypatch, tmp_path):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    config = Config()
    config.HistoryManager.enabled = False
    config.InteractiveShell.colors = "nocolor"
    shell = InteractiveShell.instance(config=config)
    shell.run_line_magic("load_ext", "labkit")
    yield shell
    InteractiveShell.clear_instance()


def test_the_cells_end_ends_it(shell, recorder):
    shell.user_ns["runner"] = QueueRunner(endless, 4)
    shell.run_cell("runner.watch(); 1 / 0")
    assert ends(recorder) == 1
    shell.run_cell("runner.watch()")
    assert ends(recorder) == 2 and not shell.events.callbacks["post_run_cell"]


def test_diagnose_takes_names_and_expressions_and_gives_the_report(shell, monkeypatch):
    monkeypatch.setattr("labkit.instruments.magics.diagnose", lambda *a, **k: (*a, k))
    shell.user_ns.update(factory=endless, step=0.05)
    assert shell.run_cell("%diagnose factory step").result == (endless, 0.05, 20.0, None, {})
    shell.run_cell("r = %diagnose -s 3 -b 8 -w process 'dict(a=1, b=2)' step*2")
    assert shell.user_ns["r"] == ({"a": 1, "b": 2}, 0.1, 3.0, 8, {"workers": "process"})
    assert shell.run_cell("%diagnose factory step;").result is None


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("%diagnose factory", "UsageError: the following arguments are required: model"),
        ("%diagnose factory nobody", "UsageError: %diagnose: expected a name or an expression"),
        ("%diagnose factory 3 4", "UsageError: unrecognized arguments: 4"),
        ("%diagnose factory (", "UsageError: %diagnose: expected a name or an expression, got '('"),
        ("%%watch -i 0\n1", "UsageError: %%watch: UsageMonitor: interval must be a number"),
        ("%%watch --often\n1", "UsageError: unrecognized arguments: --often"),
        ("%diagnose 3 0.1", "TypeError"),  # diagnose's own
    ],
)
def test_wrong_use_is_told_as_ipython_tells_it(shell, capsys, line, says):
    shell.user_ns["factory"] = endless
    assert not shell.run_cell(line).success
    told = capsys.readouterr()
    assert says in told.err + told.out


def test_help_and_completion_are_ipythons_own(shell, capsys):
    shell.run_cell("%diagnose?\n")
    shell.run_cell("%%watch?\n")
    told = capsys.readouterr().out
    assert "an iterator factory" in told and "--interval" in told
    assert "%diagnose" in shell.complete("%diag")[1] and "%%watch" in shell.complete("%%wat")[1]
    shell.user_ns["my_factory"] = endless
    for typed, completed in (("my_fac", "my_factory"), ("--sec", "--seconds")):
        line = f"%diagnose {typed}"
        assert completed in shell.complete(typed, line, len(line))[1]


def test_a_watched_cell_runs_as_it_does_without(shell, capsys):
    result = shell.run_cell("%%watch\nx = 1\nfor y in range(3): pass\n%precision 3\nx + y")
    assert result.result == 3 and shell.user_ns["y"] == 2
    told = capsys.readouterr().out
    assert told.index("labkit: 0 s") < told.index("3\n") and "CPU" in told
    assert shell.run_cell("%%watch\nx + y;").result is None
    assert shell.run_cell("%%watch\nz = 5").result is None and shell.user_ns["z"] == 5


def test_an_error_in_a_watched_cell_is_its_own_and_the_picture_is_drawn(shell, capsys):
    result = shell.run_cell("%%watch\nx = 1\n1 / 0  # here")
    told = capsys.readouterr().out
    assert isinstance(result.error_in_exec, ZeroDivisionError) and shell.user_ns["x"] == 1
    assert "labkit: 0 s" in told and "1 / 0  # here" in told
    assert told.count("Traceback") == 1
    assert isinstance(shell.run_cell("%%watch\nx = = 1").error_in_exec, SyntaxError)


def test_queue_and_waiting_of_a_watched_cell_are_found(shell, capsys):
    shell.user_ns.update(QueueRunner=QueueRunner, endless=endless, model=new_model())
    shell.run_cell(
        "%%watch -i 0.01\n"
        "with QueueRunner(endless, 4, capacity=40, min_after_dequeue=8) as runner:\n"
        "    model.fit(runner.dataset(), steps_per_epoch=20, verbose=0, shuffle=False)"
    ).raise_error()
    told = capsys.readouterr().out
    assert "waiting for data" in told and "(8 to 40)" in told


# -- in a kernel -----------------------------------------------------------------------------------

CELL = """
import time
import labkit
from labkit.instruments import live
draws, draw = [], live.Live._draw
live.Live._draw = lambda *given, **named: draws.append(1) or draw(*given, **named)
live._SOONEST = live._LATEST = 0.1
for batch in labkit.watch(iter(int, 1), live=True):
    time.sleep(0.01)
    if len(draws) > 1:
        break
"""


def test_in_a_kernel_one_picture_is_drawn_anew_and_stays(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(tmp_path))
    messages = []
    try:
        reply = client.execute_interactive(CELL, output_hook=messages.append, timeout=60)
        assert reply["content"]["status"] == "ok", reply
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    shown = [m for m in messages if "display_data" in m["msg_type"]]
    first, *later = [m["content"] for m in shown]
    assert [m["msg_type"] for m in shown][:2] == ["display_data", "update_display_data"]
    assert len(later) >= 2
    assert {m["transient"]["display_id"] for m in [first, *later]} == {
        first["transient"]["display_id"]
    }
    assert all("image/png" in update["data"] for update in later)
    last = later[-1]["data"]["text/plain"]
    assert "waiting for data" in last and last.startswith("labkit: ")
