"""The race: every contestant that is installed runs, and what the table says follows from it."""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import cloudpickle
import numpy as np
import psutil
import pytest

import labkit
from labkit.instruments import plots
from labkit.instruments.race import group, lane, track, work
from labkit.instruments.race.command import main
from labkit.instruments.race.entry import CONTESTANTS, Contestant
from labkit.instruments.race.table import Results
from labkit.quiet import tf

cloudpickle.register_pickle_by_value(sys.modules[__name__])
SIZE, STEPS = 4, 20
HERE = [e for e in CONTESTANTS.values() if not e.missing()]
PEERS = {"torch", "grain", "spdl", "ray"}


class Leaves(work.Numbered):
    """Leaves a process behind, which has nothing to do with its parent any more."""

    def __call__(self, number):
        if number == 0:
            subprocess.Popen(["sleep", "300"], start_new_session=True)
        return super().__call__(number)


def row(make=None):
    return work.Row("numbered", make or work.Numbered(), (2,), trains=False)


def in_its_own_process(entry):
    return entry.package in PEERS or (entry.in_fit and entry.processes)


@pytest.mark.parametrize("entry", HERE, ids=lambda entry: entry.name)
def test_each_contestant_delivers_whole_batches_and_no_sample_twice(entry, monkeypatch, tmp_path):
    assert entry.setting and entry.lines > 1
    if in_its_own_process(entry):
        heat = track.Heat(row(None if entry.package in PEERS else Leaves()), 2, entry.name)
        found = track.run(heat, None, 1.0, tmp_path, steps=STEPS)
        left = found.pop("left_running", 0)
        assert found.pop("took") > 0
        assert found == {"samples": STEPS * SIZE}
        assert left > 0 or entry.package in PEERS
        marks = [file.stem for file in tmp_path.glob("*.task")]
        assert len(marks) == 1 and not group.members(marks[0])
        return
    seen = []

    def step(self, *batch):
        seen.append([np.array(part) for part in batch])
        stepped(self, *batch)

    stepped = lane.Lap.step
    monkeypatch.setattr(lane.Lap, "step", step)
    # To try processes, too, takes it 10 s.
    monkeypatch.setattr(labkit, "diagnose", partial(labkit.diagnose, workers="thread"))
    model = None if entry.graph or entry.in_fit else 1e-6
    lap = lane.drive(lane.Task(entry.name, row(), 2, model, 0.0, 1.0, STEPS))
    assert lap.samples == STEPS * SIZE
    if entry.in_fit:
        return
    assert [len(images) for images, _ in seen] == [SIZE] * STEPS
    assert all(np.array_equal(images[:, 1, 1, 0], numbers) for images, numbers in seen)
    assert len({float(n) for _, numbers in seen for n in numbers}) == STEPS * SIZE


def test_a_contestant_may_read_absls_flags_as_grain_does_where_jax_is_installed(tmp_path):
    def step(images, numbers):
        from absl import flags

        assert flags.FLAGS.is_parsed()

    found = track.run(track.Heat(row(), 2, "serial loop"), step, 1.0, tmp_path, steps=STEPS)
    assert found["samples"] == STEPS * SIZE


def cnn():
    """A lap whose step trains the CNN, and a batch for it."""
    small = work.Row("small", work.Small(), (1,))
    lap = lane._prepared(lane.Task("serial loop", small, 1, None, 0.0, 1.0), graph=False)
    return lap, lane._tensors(small.make(0))


def test_the_steps_of_a_loop_train_the_model():
    lap, batch = cnn()
    losses = [float(lap.train(*batch)) for _ in range(40)]
    assert losses[-1] < losses[0]


def test_the_steps_that_fit_takes_train_the_same_model():
    lap, batch = cnn()
    before = float(lap.train(*batch))
    data = tf.data.Dataset.from_tensors(tuple(batch)).repeat(40)
    (after,) = lane._in_keras(lap).fit(data, verbose=0).history["loss"]
    # One step more would make it a little less again, and no step as much less as all of these.
    last = float(lap.train(*batch))
    assert before - after > 5 * abs(after - last)


def test_a_lap_counts_steps_processors_memory_and_the_first_batch(monkeypatch):
    task = lane.Task("serial loop", row(), 1, 1e-3, 0.05, 0.2)
    found = lane.drive(task).result
    assert 0 < found["steps_per_second"] < 1000
    assert 0 <= found["cpu_seconds_per_step"] < 1 and 0 <= found["first_batch"] < 60
    assert found["memory"] > 1e6 and found["processes"] == 1
    monkeypatch.setitem(CONTESTANTS, "none", Contestant("none", lambda row, n, lap: None))
    with pytest.raises(RuntimeError, match="none ended after 0 steps"):
        lane.drive(task._replace(contestant="none"))


def made():
    """A race that nobody ran, with round numbers."""
    results = Results.of(3, 1.0)
    results.data["machine"]["cores"] = 2
    results.enter("a, 2 workers", "a", 2)
    names = {"labkit auto": [99, 98, 90], "labkit threads": [80, 101, 85], "serial loop": [50] * 3,
             "tf.data map, own pool": [100, 100, 100]}  # fmt: skip
    for name in CONTESTANTS:
        reason = "" if name in names else "it is left out here"
        results.contestant("a, 2 workers", CONTESTANTS[name], 2, reason)
    for number in range(3):
        for name, rate, cpu in (("constant", 200, 0.004), ("generator alone", 50, 0.001)):
            found = {"steps_per_second": rate, "cpu_seconds_per_step": cpu}
            results.note("a, 2 workers", name, number, found)
        for name, rates in names.items():
            found = {"steps_per_second": rates[number], "cpu_seconds_per_step": 0.01,
                     "memory": 5e8, "first_batch": 0.25}  # fmt: skip
            results.note("a, 2 workers", name, number, found)
    return results


def test_ratios_are_paired_by_round_and_a_difference_within_them_is_a_tie(tmp_path):
    results, place = made(), "a, 2 workers"
    best = "tf.data map, own pool"
    assert results.ranked(place)[0] == best
    assert results.ratio(place, "labkit threads", best) == (0.85, 0.8, 1.01)
    assert results.is_tie(place, "labkit threads", best)  # it was ahead once
    assert results.is_tie(place, "labkit auto", best)  # within 3 %
    assert not results.is_tie(place, "serial loop", best)
    assert results.bound(place, best) == 100  # 2 workers of 50
    assert results.bound(place, "labkit auto") == 200
    assert results.bound(place, "serial loop") == 40  # 5 ms and 20 ms in turn
    text = str(results)
    assert "Untuned labkit: labkit auto / tf.data map, own pool: 0.98, 0.90 to 0.99 (a tie)" in text
    assert ", PyTorch DataLoader, " in text and " | not run: it is left out here |" in text
    assert "num_parallel_calls=n" in text and "tensorflow 2" in text
    assert "nobody mixes samples" in text
    earlier = made()
    earlier.data["rows"][place]["mixed_by_labkit"] = True
    assert "labkit mixes samples, the others do not" in str(earlier)
    results.note(place, "serial loop", 3, {"error": "it broke"})
    assert "| serial loop | failed 1 of 4: it broke |" in str(results)
    results.save(tmp_path / "race.json")
    again = Results.load(tmp_path / "race.json")
    assert str(again) == str(results)
    plots.save(again.plot(), tmp_path / "race.png")
    for other in ('{"format": 1}', "[]", "no JSON", "\x00"):
        (tmp_path / "other.json").write_text(other)
        with pytest.raises(ValueError, match=r"expected a file that labkit\.race wrote"):
            Results.load(tmp_path / "other.json")


def test_a_races_bars_fall_though_the_medians_of_rates_have_another_order():
    results, place = made(), "a, 2 workers"
    uneven = {"tf.data map, own pool": (100, 50, 200), "labkit auto": (90, 40, 100),
              "labkit threads": (85, 60, 190), "serial loop": (1, 1, 1)}  # fmt: skip
    for name, rates in uneven.items():
        for run, rate in zip(results.data["rows"][place]["rounds"][name], rates, strict=True):
            run["steps_per_second"] = rate
    results.data["rows"][place]["rounds"]["serial loop"] = [{"round": 9, "steps_per_second": 1}]
    first, *others = results.ranked(place)
    assert others[:2] == ["labkit auto", "labkit threads"]
    (axes,) = results.plot().axes  # the serial loop shares no round with the first
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == [first, "labkit threads", "labkit auto", "serial loop"]


ENDED = """
import labkit, time
def slow():
    time.sleep(300)
    yield 1
labkit.race(slow, 0.1, contestants="serial", progress=False)
"""


def test_a_race_that_is_ended_leaves_no_folder_and_no_process(tmp_path):
    def lanes(home):
        """What runs with a race's mark, and has its temporary files there."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                its = process.environ()
                if group.MARK in its and its.get("TMPDIR") == str(home):
                    yield process

    signals = (signal.SIGTERM, signal.SIGINT)
    homes = [tmp_path / str(number) for number in signals]
    for home in homes:
        home.mkdir()
    races = [
        subprocess.Popen(
            [sys.executable, "-c", ENDED], env={**os.environ, "TMPDIR": str(home)},
            stderr=subprocess.DEVNULL,
        )
        for home in homes
    ]  # fmt: skip
    deadline = time.monotonic() + 90
    for ended, home, race in zip(signals, homes, races, strict=True):
        while not any(lanes(home)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert any(home.iterdir())
        race.send_signal(ended)
    assert [race.wait(60) for race in races] == [143, -signal.SIGINT]
    assert not [thing for home in homes for thing in (*lanes(home), *home.iterdir())]


def test_who_does_not_run_is_named_with_the_reason(monkeypatch):
    absent = {"torch": "torch is not installed"}
    monkeypatch.setattr(Contestant, "missing", lambda self: absent.get(self.package, ""))
    monkeypatch.setattr(Contestant, "version", "9")
    small = work.Row("small", work.Small(), (4, 32))
    results = Results.of(1, 1.0)
    heats = list(track._heats([small], list(CONTESTANTS.values()), "other", results))
    out = results.data["rows"]["small, 32 workers"]["left_out"]
    assert out["PyTorch DataLoader"] == "torch is not installed"
    assert "32 processes" in out["labkit processes"] or os.cpu_count() > 4
    assert "runs once, in the row small, 4 workers" in out["serial loop"]
    assert "Keras model" in out["Keras PyDataset threads"]
    run = {(heat.n, heat.name) for heat in heats}
    for n, place in ((4, "small, 4 workers"), (32, "small, 32 workers")):
        for name in CONTESTANTS:
            assert ((n, name) in run) != (name in results.data["rows"][place]["left_out"])
    said = track._announced([(0, heat) for heat in 3 * heats], results, 3, 1.0)
    assert f"{3 * len(heats)} runs, about" in said and "torch is not installed" in said
    assert ": 2 rows, " in said and " 3 rounds: " in said
    left, one = [(0, heat) for heat in heats[:3]], {"rows": {"small": {"left_out": {}}}}
    alone = track._announced(left, Results(one), 1, 1.0)
    assert alone.startswith("labkit.race: 1 row, 1 contestant, 1 round: 3 runs, about ")


def test_the_version_of_a_package_that_comes_in_parts(monkeypatch, tmp_path):
    for part in ("parted_io", "parted_core"):  # as SPDL is, where its parts alone were installed
        told = tmp_path / f"{part}-1.2.dist-info"
        told.mkdir()
        (told / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {part}\nVersion: 1.2\n")
        (told / "top_level.txt").write_text("parted\n")
    monkeypatch.syspath_prepend(tmp_path)
    of = {package: Contestant("mine", row, package=package).version for package in ("parted", "?")}
    assert of == {"parted": "parted_core 1.2, parted_io 1.2", "?": "?"}


def test_rows_and_contestants_are_picked_by_parts_of_their_names():
    rows = [work.Row(name, work.Numbered(), (1, 4)) for name in ("sleep 5 ms", "sleep 50 ms")]
    wanted = (("sleep 50", {"sleep 50 ms": (1, 4)}), ("sleep:4", {r.name: (4,) for r in rows}))
    for parts, found in wanted:
        assert {row.name: row.workers for row in track._rows(rows, parts)} == found
    picked = track._picked("contestants", CONTESTANTS, ["labkit threads", "SPDL"])
    assert [entry.name for entry in picked] == [
        "labkit threads",
        "SPDL threads",
        "SPDL subprocesses",
    ]
    results = Results.of(1, 1.0)
    heats = list(track._heats(rows[:1], picked[:1], "cnn", results))
    # What the bound is made of is the same for every number of workers.
    assert [heat.name for heat in heats] == [lane.CONSTANT, lane.ALONE, *["labkit threads"] * 2]
    assert heats[0].places == ["sleep 5 ms, 1 worker", "sleep 5 ms, 4 workers"]
    out = results.data["rows"]["sleep 5 ms, 1 worker"]["left_out"]
    assert out["SPDL threads"] == out["serial loop"] == "it was not entered"


def test_all_rounds_have_all_heats_and_begin_with_another():
    heats = [track.Heat(row(), n, name) for n in (1, 2) for name in "abcdef"]
    results = Results.of(3, 1.0)
    for heat in heats:
        results.enter(heat.place, heat.row.name, heat.n)
    left = [list(track._left(heats, number, results)) for number in range(3)]
    assert all(number == at for at, r in enumerate(left) for number, _ in r)
    rounds = [[heat for _, heat in r] for r in left]
    assert all(sorted(r[:6], key=heats.index) == heats[:6] for r in rounds)
    assert len({r[0].name for r in rounds}) == 3


class Runs:
    """In place of `track.run`: notes the heats, and ends the race before the one named `ends`."""

    def __init__(self, ends):
        self.ends, self.heats = ends, []

    def __call__(self, heat, *_):
        if (heat.place, heat.name, len(self.heats)) == self.ends:
            raise KeyboardInterrupt
        self.heats.append((heat.place, heat.name))
        return {"steps_per_second": 1.0, "cpu_seconds_per_step": 0.01}


def gone_on_with(path, monkeypatch, ends=(), **changed):
    runs = Runs(ends)
    monkeypatch.setattr(track, "run", runs)
    given = {"rows": ["sleep 5 ms", "JPEG"], "contestants": "labkit", "rounds": 2, "seconds": 1.0}
    results = labkit.race(json=path, resume=True, progress=False, **{**given, **changed})
    return runs.heats, results


def test_a_race_that_was_ended_goes_on_with_the_rounds_that_are_not_whole(monkeypatch, tmp_path):
    path = tmp_path / "race.json"
    heats, whole = gone_on_with(tmp_path / "whole.json", monkeypatch)
    places = list(dict.fromkeys(place for place, _ in heats))
    of = {place: [name for at, name in heats if at == place] for place in places}
    assert len(places) > 2 and "constant" in of[places[0]] and "constant" not in of[places[1]]
    # In the midst of the second round of the second row.
    first = len(heats) // 2 + len(of[places[0]]) // 2
    ends = (places[1], of[places[1]][len(of[places[1]]) // 2 + 1], first + 1)
    with pytest.raises(KeyboardInterrupt):
        gone_on_with(path, monkeypatch, ends)
    assert not Results.load(path).data["complete"]
    left, results = gone_on_with(path, monkeypatch)
    assert left == heats[first:] and results.data["complete"]
    assert len(results.data["resumed"]) == 1 and "Gone on with" in str(results)
    for place, row in whole.data["rows"].items():
        ran = results.data["rows"][place]
        assert row["left_out"] == ran["left_out"] and row["rounds"].keys() == ran["rounds"].keys()
        for name in row["rounds"]:
            assert sorted(results.rates(place, name)) == [0, 1]
    assert gone_on_with(path, monkeypatch)[0] == []
    # More rounds, or another row, may follow.
    assert len(gone_on_with(path, monkeypatch, rounds=3)[0]) == len(heats) // 2
    more, results = gone_on_with(path, monkeypatch, rows=["JPEG", "NumPy aug"], rounds=3)
    assert {place.partition(",")[0] for place, _ in more} == {"NumPy augmentation"}
    assert list(results.data["rows"])[:2] == places[:2] and results.data["complete"]


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"seconds": 2.0}, "but seconds was 1.0 and is 2.0. Begin anew, with another file"),
        ({"contestants": "Grain"}, "labkit threads was 'to run' and is 'it was not entered'"),
        ({"contestants": ["labkit", "serial"]}, "serial loop was 'it was not entered' and is"),
    ],
)
def test_a_race_goes_on_with_the_same_race_alone(changed, said, monkeypatch, tmp_path):
    path = tmp_path / "race.json"
    gone_on_with(path, monkeypatch)
    kept = path.read_text()
    with pytest.raises(ValueError, match=r"race: expected to go on with the same race") as error:
        gone_on_with(path, monkeypatch, **changed)
    assert said in str(error.value)
    assert path.read_text() == kept
    data = json.loads(kept)
    data["machine"]["processor"] = "another"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="processor was 'another' and is "):
        gone_on_with(path, monkeypatch)
    with pytest.raises(ValueError, match="resume needs json, the file to go on with, got None"):
        labkit.race(resume=True)


def test_the_rows_make_what_they_say(tmp_path):
    rows = {row.name: row for row in work.rows(tmp_path)}
    for name, wanted in rows.items():
        images, labels = wanted.make(3)
        assert len(images) == len(labels) == wanted.batch_size
        if "free" in name:
            assert 90e3 < images.nbytes < 110e3 if "100 KB" in name else 19e6 < images.nbytes < 20e6
            assert images.dtype == name.split()[-1]
        ready = wanted.queue["capacity"] / wanted.batch_size
        assert ready == (4 if "19 MB" in name else 20) and wanted.queue["shuffle"] is False
        again = next(wanted.factory(3, 5))
        if name != "NumPy augmentation":
            assert np.array_equal(images, again[0]) and images is not again[0]
    shares = [next(rows["free 100 KB uint8"].factory(w, 2))[0] for w in (0, 1)]
    assert not np.array_equal(*shares)


def test_a_factory_of_the_users_runs_pass_after_pass(tmp_path):
    def factory(worker, n_workers, epoch):
        for i in range(worker, 4, n_workers):
            yield np.full(2, 10 * epoch + i), np.zeros(2)

    mine = cloudpickle.loads(cloudpickle.dumps(work.Row("mine", work.Own(factory), (2,))))
    shares = [mine.factory(worker, 2) for worker in (0, 1)]
    assert [[int(next(s)[0][0]) for _ in range(3)] for s in shares] == [[0, 2, 10], [1, 3, 11]]
    assert [int(mine.make(0)[0][0]) for _ in range(5)] == [0, 1, 2, 3, 10]
    with pytest.raises(TypeError, match="cannot be pickled"):
        track.run(track.Heat(mine, 1, "serial loop"), threading.Lock(), 1.0, tmp_path)


def test_the_command_that_is_kept_can_be_pasted(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("labkit.instruments.race.command.race", lambda *_, **__: Results.of(1, 1.0))
    asked = ["--rows", "sleep 5 ms:4,19 MB float", "--json", str(tmp_path / "a race.json")]
    assert main(asked) == 0
    kept = json.loads((tmp_path / "a race.json").read_text())["command"]
    assert shlex.split(kept) == ["python", "-m", "labkit.race", *asked]


def test_wrong_use_is_met_with_a_sentence(capsys):
    for arguments, said in (
        (["--rows", "nothing"], "rows must be parts of the names sleep 50 ms, "),
        (["--rows", "sleep 5 ms:3"], "sleep 5 ms has (4, 16) workers"),
        (["--contestants", "nobody"], "contestants must be parts of the names "),
        (["--rounds", "0"], "rounds must be an integer >= 1, got 0"),
        (["--seconds", "-1"], "seconds must be a number > 0, got -1.0"),
        (["nowhere:factory"], "there is no module nowhere"),
        (["--row"], "unknown flag"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        assert said in capsys.readouterr().err or "--row" in arguments
    with pytest.raises(ValueError, match="rounds must be an integer"):
        labkit.race(rounds=True)
