"""A report as a file, two side by side, `python -m labkit.diagnose`, and what notebooks show.

The reports are made of numbers, as in tests/test_diagnosis.py: nothing is measured but once.
"""

import importlib
import json
import os
import re
import stat
import subprocess
import sys
import textwrap
from dataclasses import replace

import numpy as np
import pytest

import labkit
from labkit.engine import KINDS
from labkit.engine.messages import Lost
from labkit.instruments.audit import Audit
from labkit.instruments.command import main
from labkit.instruments.laws import Demands
from labkit.instruments.measure import Model
from labkit.instruments.report import Report, Row
from labkit.instruments.stages import Stage
from labkit.instruments.usage_monitor import Gpu
from labkit.sources import as_factory

NASTY = "<script>alert('&')</script> \udcff é"


def light():
    while True:
        yield np.zeros((8, 4), np.float32), np.zeros((8, 1), np.float32)


def step(batch):
    pass


def report_of(rates=(20, 40, 78), model_rate=100.0, serial_rate=18.0, half=0.1, **more):
    """A report of threads that make `rates` with 1, 2, 4, …, in ranges of plus and minus `half`."""
    rows = [
        Row("thread", 2**k, float(rate), rate * (1 - half), rate * (1 + half), "the generator")
        for k, rate in enumerate(rates)
    ]
    demands = {"thread": Demands(0.05, 0.01, 0.0, 1 / model_rate, 0.01, 2)}
    live = {"iterator": light, "model": Model.of(step, None), "repeated": None}
    given = {"nature": "waits", "batch_size": 8, "wall": 0.05, "seconds": 1.0, **live, **more}
    rates = {"model_rate": model_rate, "serial_rate": serial_rate}
    return Report(rows=rows, best=rows[-1], demands=demands, **rates, **given)


def full():
    """One in which everything is set, text of the user's as bad as it can be."""
    stages = [Stage(NASTY, 0.03, 0.6, 0.001, 1.0), Stage("draw", 0.01, 0.2, 0.0, 2.5)]
    report = report_of(problems={"process": f"{NASTY}\nsecond line"}, stages=stages)
    more = {"memory": 2e6, "free": 1e9, "moved": 100, "handed": 2e-4}
    report.demands["thread"] = replace(report.demands["thread"], **more)
    report.rows[1].measured = 10.0
    report.model.taken, report.ready_rate = 1234, 90.0
    report.take_in(report.rows[1:2], now=50.0)
    return report


def whole():
    return report_of(iterator=as_factory(Again()), model=Model.of(0.01, None))


class Again:
    def __iter__(self):
        return light()


def left():
    return report_of((99.0, 98.0), model_rate=100.0, serial_rate=99.0)


# -- saved and loaded ----------------------------------------------------------------------------


@pytest.mark.parametrize("make", [report_of, full, whole, left])
def test_a_loaded_report_shows_what_the_saved_one_did(make, tmp_path, monkeypatch):
    here = "labkit.instruments.report"
    machine = {"processor": "Old & slow", "cores": 3, "tensorflow": "2.0", "python": "3.9.1"}
    monkeypatch.setattr(f"{here}.describe_machine", lambda: machine)
    monkeypatch.setattr(f"{here}.onednn_note", lambda: "oneDNN is off here.")
    saved = make()
    saved.save(tmp_path / "a.json")
    shown = (repr(saved), str(saved), saved._repr_html_(), saved.table(), saved.verdict)
    monkeypatch.setattr(f"{here}.describe_machine", lambda: {**machine, "processor": "another"})
    monkeypatch.setattr(f"{here}.onednn_note", lambda: None)
    loaded = labkit.load_report(tmp_path / "a.json")
    assert loaded._repr_html_() == shown[2], "the plot, or what it is drawn from, has changed"
    assert (repr(loaded), str(loaded), shown[2], loaded.table(), loaded.verdict) == shown
    assert loaded.loaded and not saved.loaded
    assert (loaded.about.machine, loaded.date) == (machine, saved.date)
    assert loaded.about.labkit == labkit.__version__
    loaded.save(tmp_path / "b.json")
    assert (tmp_path / "b.json").read_bytes() == (tmp_path / "a.json").read_bytes()


def test_what_the_text_of_a_report_tells_is_in_the_file_and_json_is_strict(tmp_path):
    report = full()
    assert report.demands["thread"].bandwidth == np.inf
    report.save(tmp_path / "a.json")
    text = (tmp_path / "a.json").read_text()

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    data = json.loads(text, parse_constant=refuse)
    assert (data["format"], data["verdict"]) == (1, report.verdict)
    assert data["waiting"] == report.waiting == pytest.approx(0.82)
    assert data["about"]["machine"]["cores"] >= 1 and data["report"]["date"] == report.date


@pytest.mark.parametrize("call", ["runner", "check"])
def test_a_loaded_report_says_that_it_cannot_run_and_what_to_do(call, tmp_path):
    report_of().save(tmp_path / "a.json")
    loaded = labkit.load_report(tmp_path / "a.json")
    with pytest.raises(RuntimeError, match=rf"^Report\.{call}: .*diagnose.*n_workers=4, worke"):
        getattr(loaded, call)()


def broken(data, *path, value=None):
    """The data with another value at a place; None takes the place away."""
    inner = data
    for name in path[:-1]:
        inner = inner[name]
    if value is None:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: "", "JSONDecodeError"),
        (lambda data: "[1, 2]", "no 'format' number"),
        (lambda data: json.dumps(data)[:-40], "JSONDecodeError"),
        (lambda data: "[" * 100_000, "RecursionError"),
        (lambda data: '{"format": NaN}', "NaN"),
        (lambda data: broken(data, "format"), "no 'format' number"),
        (lambda data: broken(data, "format", value=2), "its format is 2.*update labkit"),
        (lambda data: broken(data, "format", value=0), "diagnose again"),
        (lambda data: broken(data, "report", "wall"), "report must have"),
        (lambda data: broken(data, "report", "more", value=1), "report must have"),
        (lambda data: broken(data, "report", "wall", value="1"), r"report\.wall must be of type"),
        (lambda data: broken(data, "report", "wall", value=0), "numbers above 0"),
        (lambda data: broken(data, "report", "model_rate", value="nan"), "numbers above 0"),
        (lambda data: broken(data, "report", "rows", value=[]), "not in list"),
        (lambda data: broken(data, "report", "rows", 1, "n", value=True), r"rows\[1\]\.n"),
        (lambda data: broken(data, "report", "rows", 0, "workers", value="fibre"), "kind 'fibre'"),
        (lambda data: broken(data, "report", "demands", value={}), "ValueError|KeyError"),
        (lambda data: broken(data, "about", "machine", "cores"), "has no cores"),
    ],
)
def test_a_file_that_holds_no_report_is_refused_by_name(change, words, tmp_path):
    path = tmp_path / "a.json"
    report_of().save(path)
    path.write_text(change(json.loads(path.read_text())))
    with pytest.raises(ValueError, match=rf"(?s)^load_report: expected .*a\.json.*({words})"):
        labkit.load_report(path)


def test_what_an_older_labkit_did_not_measure_is_unknown_and_not_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    by_name = {**KINDS, "thread": replace(KINDS["thread"], by_name=True)}
    monkeypatch.setattr("labkit.instruments.report.KINDS", by_name)
    full().save(path)
    assert "Handing a batch over, as measured alone: 0.2 ms" in str(labkit.load_report(path))
    path.write_text(broken(json.loads(path.read_text()), "report", "demands", "thread", "handed"))
    old = labkit.load_report(path)
    assert old.demands["thread"].handed is None and "Handing" not in str(old)


def test_bytes_that_are_no_text_are_refused_and_a_file_that_is_not_there_is_said_so(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ValueError, match="load_report: expected a file written by"):
        labkit.load_report(tmp_path / "a.json")
    with pytest.raises(FileNotFoundError):
        labkit.load_report(tmp_path / "no.json")


@pytest.mark.parametrize("method", ["save", "to_html"])
def test_a_file_is_written_whole_or_not_at_all(method, tmp_path, monkeypatch):
    write = getattr(report_of(), method)
    with pytest.raises(FileNotFoundError, match=r"folder of .* does not exist; make it first"):
        write(tmp_path / "no" / "a")
    assert not any(tmp_path.iterdir())
    path, link = tmp_path / "a", tmp_path / "link"
    path.write_text("old")
    path.chmod(0o640)
    link.symlink_to(path)
    with monkeypatch.context() as patched, pytest.raises(OSError, match="disk full"):
        patched.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        write(link)
    assert path.read_text() == "old" and set(tmp_path.iterdir()) == {path, link}
    write(link)
    assert path.read_text() != "old" and link.is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert set(tmp_path.iterdir()) == {path, link}
    with pytest.raises(IsADirectoryError):
        write(tmp_path)
    write(os.devnull)  # which must stay what it is
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)


@pytest.mark.parametrize("again", [False, True])
def test_a_page_needs_nothing_beside_it_and_holds_no_code_of_the_users(again, tmp_path):
    report = full()
    if again:
        report.save(tmp_path / "a.json")
        report = labkit.load_report(tmp_path / "a.json")
    report.to_html(str(tmp_path / "a.html"))
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>") and '<meta charset="utf-8">' in page
    assert "<script" not in page and page.count("&lt;script&gt;") >= 2
    sources = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'>]{1,30})""", page)
    assert len(sources) == 1 and sources[0].startswith("data:image/png;base64,")
    assert "http" not in re.sub(r"base64,[^\"]*", "", page)
    assert report.date in page and labkit.__version__ in page


# -- compared --------------------------------------------------------------------------------------


def judged(before, after):
    return [change.judged.split(",")[0] for change in labkit.compare(before, after).changes]


SAME = "no change beyond the noise"


@pytest.mark.parametrize(
    ("after", "words"),
    [
        ({}, [SAME] * 3),
        ({"model_rate": 110.0, "serial_rate": 16.0}, [SAME] * 3),
        # Ranges of 78 up to 85.8, and from 0.9 x 89 or 91: hypot(log 1.1, log 0.9) is 1.153 times.
        ({"rates": (20, 40, 89)}, [SAME] * 3),
        ({"rates": (20, 40, 91)}, [SAME, SAME, "faster"]),
        ({"rates": (20, 40, 60)}, [SAME, SAME, "slower"]),
        ({"serial_rate": 36.0}, [SAME, "faster", SAME]),
        # All by as much: the machine, not the change of the user's.
        (
            {"rates": (40, 80, 156), "model_rate": 200.0, "serial_rate": 36.0},
            ["faster", *["as the model alone: the machine or the model is another"] * 2],
        ),
        ({"model_rate": 200.0, "serial_rate": 9.0}, ["faster", "slower", SAME]),
    ],
)
def test_a_change_is_told_from_noise_and_from_drift(after, words):
    assert judged(report_of(), report_of(**after)) == words


def test_twice_as_fast_is_more_than_chance_in_ranges_of_forty_percent():
    wide = {"half": 0.4}  # 12 to 28 and 25.2 to 58.8 overlap: 2.1 > exp(hypot(log 1.4, log 0.6))
    before, after = report_of((20,), **wide), report_of((42,), **wide)
    assert judged(before, after) == [SAME, SAME, "faster"]
    assert judged(before, report_of((36,), **wide)) == [SAME] * 3


def test_a_comparison_shows_both_verdicts_the_rates_and_their_ratio(tmp_path):
    before, after = report_of(problems={"process": NASTY}), report_of((20, 156), serial_rate=19.0)
    before.save(tmp_path / "a.json")
    found = labkit.compare(str(tmp_path / "a.json"), after)
    assert found.before.loaded and found.after is after
    assert [change.ratio for change in found.changes] == pytest.approx([1.0, 19 / 18, 2.0])
    text, page = str(found), found._repr_html_()
    assert repr(found) == text and found.warning == ""
    assert before.verdict in text and after.verdict in text
    line = " ".join(text.partition("recommended: ")[2].splitlines()[0].split())
    assert line == "4 threads, then 2 threads 78.0 156.0 2.00 faster, beyond the noise"
    assert "<script" not in page and "<td>2.00</td>" in page and "4 threads, then 2 thr" in page
    assert "recommended: your loop" in str(labkit.compare(left(), left()))


def test_a_comparison_of_other_machines_warns(tmp_path):
    for name, cores, size in (("a", 2, 8), ("b", 64, 32)):
        report_of(batch_size=size).save(tmp_path / name)
        data = json.loads((tmp_path / name).read_text())
        data["about"]["machine"]["cores"] = cores
        (tmp_path / name).write_text(json.dumps(data))
    found = labkit.compare(tmp_path / "a", tmp_path / "b")
    assert found.warning.endswith("batch_size 8, then 32; cores 2, then 64.")
    assert found.warning in str(found) and found.warning in found._repr_html_()


@pytest.mark.parametrize("wrong", [None, 5, {"format": 1}])
def test_only_reports_can_be_compared(wrong):
    with pytest.raises(TypeError, match="compare: expected two reports"):
        labkit.compare(report_of(), wrong)


# -- python -m labkit.diagnose -------------------------------------------------------------------

MODULE = """
    import time
    import numpy as np

    def batches():
        while True:
            time.sleep(0.004)
            yield np.zeros((8, 4), np.float32), np.zeros((8, 1), np.float32)

    def step(batch):
        time.sleep(0.004)

    def build_model():
        return None

    class place:
        inside = step

    five = 5
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module in the current folder, with MODULE in it."""
    name = re.sub(r"\W", "_", tmp_path.name)
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(MODULE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    yield name
    for known in [known for known in sys.modules if known.startswith(name)]:
        del sys.modules[known]


@pytest.fixture
def diagnosed(monkeypatch):
    """What diagnose was called with; it measures nothing, and the model waits for 82 %."""
    calls = []

    def diagnose(*given, **options):
        calls.append(given)
        return report_of()

    monkeypatch.setattr("labkit.instruments.diagnosis.diagnose", diagnose)
    return calls


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        ([], 0, ""),
        (["--fail-if-waiting", "0.83"], 0, ""),
        (["--fail-if-waiting", "0.2"], 1, "the model waits for data 82.0% of its time, more than"),
    ],
)
def test_the_exit_code_says_whether_the_model_waits_too_much(
    flags, code, words, module, diagnosed, capsys, tmp_path
):
    named = [f"{module}:batches", "--model", f"{module}:step"]
    files = ["--json", "out.json", "--html", "out.html"]
    assert main([*named, *files, *flags, "--batch_size", "16", "--seconds", "3"]) == code
    out, err = capsys.readouterr()
    factory, model, *rest = diagnosed[0]
    assert (factory, model) == (sys.modules[module].batches, sys.modules[module].step)
    assert rest == [3.0, 16]
    report = labkit.load_report("out.json")
    assert out == f"{report}\n"
    assert report._repr_html_() in (tmp_path / "out.html").read_text()
    assert words in err and err.count("\n") == (code == 1)


@pytest.mark.parametrize(("text", "model"), [("M:place.inside", None), ("0.01", 0.01)])
def test_a_model_is_a_dotted_name_or_the_seconds_of_a_step(text, model, module, diagnosed):
    assert main([f"{module}:batches", "--model", text.replace("M", module)]) == 0
    assert diagnosed[0][1] == (model or sys.modules[module].place.inside)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "M:step"], "MODULE:FACTORY"),
        (["M:batches"], "--model"),
        (["M", "--model", "M:step"], "expected module:name, as my_module:factory for .*got 'test"),
        (["M.py:batches", "--model", "M:step"], "expected module:name"),
        (["./M:batches", "--model", "M:step"], "expected module:name"),
        (["no_such_one:batches", "--model", "M:step"], "no module no_such_one in this folder"),
        (["M.sub:batches", "--model", "M:step"], r"there is no module \w+\.sub "),
        (["broken:batches", "--model", "M:step"], "to import broken raised ZeroDivisionError"),
        (["leaves:batches", "--model", "M:step"], "to import leaves raised SystemExit: 3"),
        (["needs:batches", "--model", "M:step"], "to import needs raised ModuleNotFound.*absent"),
        (["M:batche", "--model", "M:step"], "has no batche, did you mean batches?"),
        (["M:batches", "--model", "M:"], "--model: expected module:name"),
        (["M:batches", "--model", "M:build_model"], r"takes nothing.*model = build_model\(\) in"),
        (["M:batches", "--model", "M:five", "--batch_size", "0"], "batch_size must be None or"),
        (["M:batches", "--model", "M:place.__name__"], "model must be a compiled Keras model, a"),
        (["M:batches", "--model", "M:step", "--seconds", "0"], "seconds must be a number > 0"),
        (["M:batches", "--model", "M:step", "--batch_size", "x"], "batch_size"),
        (["M:five", "--model", "M:step"], "got int 5"),
        (["M:batches", "--model", "M:step", "--fail-if-waiting", "20%"], "a share from 0 to 1"),
        (["M:batches", "--model", "M:step", "--fail-if-waiting", "nan"], "a share from 0 to 1"),
        (["M:batches", "--model", "M:step", "--json", "no/a.json"], "--json: the folder of"),
        (["M:batches", "--model", "M:step", "--html", "."], "--html: expected a file"),
        (["M:batches", "--model", "M:step", "--htm1", "a"], "did you mean --html?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_use_exits_with_2_and_says_what_was_expected(flags, words, module, capsys, tmp_path):
    for name, text in (("broken", "1 / 0"), ("leaves", "exit(3)"), ("needs", "import absent")):
        (tmp_path / f"{name}.py").write_text(text)
    before = set(tmp_path.iterdir())
    with pytest.raises(SystemExit) as ended:
        main([flag.replace("M", module) for flag in flags])
    assert ended.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("python -m labkit.diagnose: ") and re.search(words, last)
    assert "diagnose: diagnose: " not in last
    assert {path for path in tmp_path.iterdir() if path.suffix} == before


def raising(error):
    def raises(*args, **options):
        raise error

    return raises


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (labkit.WorkerError("labkit: worker 0 raised OSError: no disk"), 1, "no disk"),
    ],
)
def test_a_failed_worker_and_an_interrupt_have_their_own_exit_codes(
    error, code, words, module, monkeypatch, capsys
):
    monkeypatch.setattr("labkit.instruments.diagnosis.diagnose", raising(error))
    assert main([f"{module}:batches", "--model", f"{module}:step", "--json", "a.json"]) == code
    assert words in capsys.readouterr().err and not os.path.exists("a.json")


def test_an_error_of_the_users_step_keeps_its_traceback(module, monkeypatch):
    monkeypatch.setattr("labkit.instruments.diagnosis.diagnose", raising(TypeError("my own")))
    with pytest.raises(TypeError, match="my own"):
        main([f"{module}:batches", "--model", f"{module}:step"])


def test_a_file_that_cannot_be_written_after_all_is_told(module, diagnosed, monkeypatch, capsys):
    monkeypatch.setattr(Report, "save", raising(OSError("disk full")))
    assert main([f"{module}:batches", "--model", f"{module}:step", "--json", "a.json"]) == 1
    assert "could not be written: disk full" in capsys.readouterr().err


def test_worker_processes_find_the_module_too(module, monkeypatch):
    def diagnose(factory, *given, **options):
        with labkit.QueueRunner(factory, 8, workers="process", min_after_dequeue=0) as runner:
            assert next(iter(runner.dataset()))[0].shape == (8, 4)
        return report_of()

    monkeypatch.setattr("labkit.instruments.diagnosis.diagnose", diagnose)
    assert main([f"{module}:batches", "--model", f"{module}:step"]) == 0


@pytest.mark.slow  # a program; that of labkit.train shows the same
def test_the_screen_shows_nothing_of_tensorflows_start(module):
    with open(f"{module}.py", "a") as text:
        text.write("import tensorflow")
    command = [sys.executable, "-m", "labkit.diagnose", f"{module}:batches"]
    root = os.path.dirname(os.path.dirname(labkit.__file__))
    done = subprocess.run(
        [*command, "--model", f"{module}:five.real", "--batch_size", "0"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and "batch_size must be" in done.stderr, done.stderr


def test_diagnose_is_a_function_before_and_after_its_module_is_imported(monkeypatch):
    from labkit.instruments import diagnosis

    first = labkit.diagnose
    monkeypatch.delitem(sys.modules, "labkit.diagnose", raising=False)
    monkeypatch.setattr(labkit, "diagnose", first)
    module = importlib.import_module("labkit.diagnose")
    assert labkit.diagnose is module and module.diagnose is first is diagnosis.diagnose
    for function in (first, labkit.diagnose):
        with pytest.raises(ValueError, match="diagnose: seconds must be"):
            function(light, 0.01, seconds=0)


# -- the others in notebooks -----------------------------------------------------------------------


def test_an_audit_is_shown_as_its_text():
    found = Audit(100, 90, 5, 10, None, f"Samples repeat. {NASTY}")
    shown = found._repr_html_()
    assert "90 samples delivered of 100 expected: 5 repeated, 10 missed" in shown
    assert "<p>Samples repeat. &lt;script&gt;" in shown and "<script" not in shown


def test_a_worker_error_shows_the_worker_the_error_and_the_traceback_in_its_lines():
    error = Lost(3, f"raised OSError: {NASTY}", "Traceback:\n  <module>\nOSError\n").as_error()
    shown = error._repr_html_()
    assert shown.startswith("<p><b>WorkerError (worker 3):</b> labkit: worker 3 raised OSError: ")
    assert shown.endswith("<pre>Traceback:\n  &lt;module&gt;\nOSError</pre>")
    assert "<script" not in shown
    assert labkit.WorkerError("none")._repr_html_() == "<p><b>WorkerError:</b> none</p>"


def test_a_usage_monitor_shows_what_it_saw_in_a_line():
    monitor = labkit.UsageMonitor(probes={"queue depth": int, "broken": int})
    assert repr(monitor) == "UsageMonitor: no samples yet"
    monitor.seconds += [0.1, 0.2]
    monitor.cpu += [30.0, 50.0]
    monitor.process_cpu += [0.5, 0.7]
    monitor.memory += [4e8, 1.5e9]
    monitor.probes["queue depth"] += [10.0, 14.0]
    monitor.probes["broken"] += [np.nan, np.nan]
    monitor.problems["broken"] = "KeyError: 'depth'"
    monitor.gpu_message = "no NVIDIA driver here"
    assert repr(monitor) == (
        "UsageMonitor: 2 samples in 0.2 s, CPU 40%, this process 0.6 cores, at most 1,500 MB, "
        "no NVIDIA driver here, queue depth 12, broken unknown, "
        "no answer from broken (KeyError: 'depth')"
    )
    monitor.gpus.append(Gpu(0, "H100", 8e10, [80.0, 90.0], [1e9, 2e9]))
    assert ", GPU 0 H100 85%, " in repr(monitor) and "NVIDIA driver" not in repr(monitor)
