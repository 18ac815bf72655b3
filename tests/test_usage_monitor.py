"""UsageMonitor: what it samples, what it survives, what it costs.

The GPU tests run pynvml's real path, in a child process against a stub of NVIDIA's library.
"""

import ctypes
import json
import math
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from labkit.instruments.usage_monitor import UsageMonitor

HERE = Path(__file__).resolve().parent
GIB = 2**30
COMPILER = next((c for c in ("gcc", "cc", "clang") if shutil.which(c)), None)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler for the NVML stub")


def samplers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "labkit-usage"]


def series(usage: UsageMonitor) -> list[list[float]]:
    return [usage.seconds, usage.cpu, usage.process_cpu, usage.memory, *usage.probes.values()]


# -- the sampler ---------------------------------------------------------------------------------


def test_samples_come_at_the_interval_and_cost_little():
    depths = iter(range(10**6))
    with UsageMonitor(interval=0.1, probes={"depth": lambda: next(depths)}) as usage:
        time.sleep(2.05)
    assert 14 <= len(usage.seconds) <= 21
    assert {len(row) for row in series(usage)} == {len(usage.seconds)}
    assert usage.probes["depth"] == list(range(len(usage.seconds)))
    assert 0 < usage.cost < 0.05
    assert usage.problems == {}


def test_a_slow_probe_does_not_shift_later_samples():
    with UsageMonitor(interval=0.05, probes={"slow": lambda: time.sleep(0.03) or 1}) as usage:
        time.sleep(1.5)
    # Sleeping a whole interval after each probe would give about 18.
    assert len(usage.seconds) >= 22
    off_tick = [second % 0.05 for second in usage.seconds]
    assert np.median(off_tick) < 0.02


def test_missed_ticks_are_left_out_not_made_up_for():
    with UsageMonitor(interval=0.02, probes={"slow": lambda: time.sleep(0.11) or 1}) as usage:
        time.sleep(1.0)
    assert np.min(np.diff(usage.seconds)) > 0.1


def test_process_cpu_tells_working_from_waiting():
    with UsageMonitor(interval=0.05) as waiting:
        time.sleep(0.5)
    with UsageMonitor(interval=0.05) as working:
        end = time.process_time() + 0.4
        while time.process_time() < end:
            pass
    idle, busy = waiting.summary()["process_cpu"], working.summary()["process_cpu"]
    assert busy > 0.15
    assert busy > 3 * idle
    assert all(0 <= percent <= 100 for percent in working.cpu)


def test_memory_sees_an_array_that_is_held():
    with UsageMonitor(interval=0.02) as usage:
        time.sleep(0.15)
        array = np.ones(64 * 2**20, np.uint8)
        time.sleep(0.15)
    assert usage.summary()["memory"] - usage.memory[0] > 0.8 * array.nbytes


@pytest.mark.parametrize("several", [False, True])
def test_the_figure_takes_one_monitor_or_some_by_their_labels(several):
    from labkit import plots

    with UsageMonitor(probes={"depth": lambda: 3}) as usage:
        pass
    figure = plots.usage({"a": usage, "b": usage} if several else usage)
    assert len(figure.axes) == (8 if several else 4)
    assert [ax.get_ylabel() for ax in figure.axes][:: 2 if several else 1][3] == "depth"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity masks here")
def test_cpu_counts_only_the_cores_that_the_process_may_use():
    script = """
        import os, time
        from labkit.instruments.usage_monitor import UsageMonitor
        one = min(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {one})
        with UsageMonitor(interval=0.2) as usage:
            end = time.monotonic() + 1
            while time.monotonic() < end:
                pass
        report(usage)
    """
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core: nothing to leave out")
    usage = child(script)
    assert np.median(usage["cpu"]) > 80


def test_a_block_shorter_than_the_interval_still_gets_one_sample():
    with UsageMonitor(interval=60, probes={"one": lambda: 1}) as usage:
        pass
    assert [len(row) for row in series(usage)] == [1, 1, 1, 1, 1]
    assert usage.summary()["memory"] > 0


# -- starting and stopping -----------------------------------------------------------------------


def test_the_thread_is_a_daemon_and_gone_after_the_block():
    with UsageMonitor(interval=0.01):
        assert [thread.daemon for thread in samplers()] == [True]
    assert samplers() == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_thread_is_gone_after_an_exception_and_the_exception_passes(error):
    usage = UsageMonitor(interval=0.01)
    with pytest.raises(error, match="from the block"), usage:
        time.sleep(0.05)
        raise error("from the block")
    assert samplers() == []
    assert usage.seconds


def test_leaving_does_not_wait_for_the_next_tick():
    begin = time.monotonic()
    with UsageMonitor(interval=60):
        pass
    assert time.monotonic() - begin < 10


def test_entering_again_starts_afresh_and_leaves_the_first_lists_alone():
    usage = UsageMonitor(interval=0.02, probes={"broken": lambda: 1 / 0})
    with usage:
        time.sleep(0.3)
    first, count = usage.seconds, len(usage.seconds)
    with usage:
        assert usage.problems.get("cpu") is None
        time.sleep(0.05)
    assert len(first) == count
    assert 1 <= len(usage.seconds) < count
    assert usage.seconds[0] < 0.3
    assert {len(row) for row in series(usage)} == {len(usage.seconds)}


def test_entering_twice_at_once_is_refused_and_the_first_block_goes_on():
    with UsageMonitor(interval=0.02) as usage:
        with pytest.raises(RuntimeError, match="already sampling"), usage:
            pass
        time.sleep(0.1)
    assert usage.seconds
    assert samplers() == []


def test_a_probe_that_hangs_does_not_hang_the_end_of_the_block(monkeypatch):
    monkeypatch.setattr("labkit.instruments.usage_monitor._JOIN_SECONDS", 0.2)
    release = threading.Event()
    with UsageMonitor(interval=0.01, probes={"stuck": lambda: release.wait(30)}) as usage:
        time.sleep(0.05)
    assert "probe" in usage.problems["sampler"]
    with pytest.raises(RuntimeError, match="already sampling"), usage:
        pass
    release.set()
    usage._thread.join(10)
    assert samplers() == []


# -- arguments, probes, results ------------------------------------------------------------------


@pytest.mark.parametrize("interval", [0, -1, math.nan, math.inf, "0.1", None, True])
def test_a_wrong_interval_is_named(interval):
    with pytest.raises(ValueError) as error:
        UsageMonitor(interval=interval)
    assert str(error.value).startswith("UsageMonitor: interval must be ")
    assert str(error.value).endswith(f", got {interval!r}")


def test_a_probe_that_is_no_function_is_named():
    with pytest.raises(ValueError, match=r"probes must map a name to a function.*got <built-in"):
        UsageMonitor(probes=len)
    with pytest.raises(ValueError, match=r"probe 'depth' must be a function, got 3"):
        UsageMonitor(probes={"depth": 3})


def test_a_failing_probe_leaves_gaps_and_its_first_error():
    calls = iter(range(10**6))

    def sometimes():
        call = next(calls)
        if call in (1, 2):
            raise OSError(f"call {call} failed")
        return call

    probes = {"sometimes": sometimes, "no number": lambda: "full", "fine": lambda: 7}
    with UsageMonitor(interval=0.02, probes=probes) as usage:
        time.sleep(0.4)
    values = usage.probes["sometimes"]
    assert len(values) > 4
    assert [math.isnan(value) for value in values[:4]] == [False, True, True, False]
    assert usage.problems["sometimes"] == "OSError: call 1 failed"
    assert usage.problems["no number"].startswith("ValueError")
    assert set(usage.problems) == {"sometimes", "no number"}
    assert set(usage.probes["fine"]) == {7.0}
    summary = usage.summary()
    assert summary["probes"]["fine"] == 7
    assert summary["probes"]["sometimes"] >= 0
    assert math.isnan(summary["probes"]["no number"])


def test_as_dict_survives_json_and_is_a_copy():
    with UsageMonitor(interval=0.02, probes={"depth": lambda: 3}) as usage:
        time.sleep(0.1)
    plain = usage.as_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert json.loads(json.dumps(usage.summary())) == usage.summary()
    plain["seconds"].clear()
    plain["probes"]["depth"].clear()
    assert usage.seconds and usage.probes["depth"]


# -- GPUs ----------------------------------------------------------------------------------------


def child(script: str, libraries: Path | None = None, **settings: str) -> dict:
    """Runs the script in a Python of its own; returns what it hands to report(usage)."""
    report = (
        "import json\n"
        "def report(usage, **more):\n"
        "    print(json.dumps({**usage.as_dict(), 'summary': usage.summary(), **more}))\n"
    )
    environment = {**os.environ, **settings, "PYTHONPATH": str(HERE.parent)}
    if libraries is not None:
        environment["LD_LIBRARY_PATH"] = str(libraries)
    done = subprocess.run(
        [sys.executable, "-c", report + textwrap.dedent(script)],
        env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


SAMPLE = """
    import time
    from labkit.instruments.usage_monitor import UsageMonitor
    from labkit.machine import describe_machine
    with UsageMonitor(interval=0.02) as usage:
        time.sleep(0.3)
    report(usage, machine=describe_machine())
"""


@pytest.fixture(scope="module")
def stub(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("nvml")
    library, source = folder / "libnvidia-ml.so.1", HERE / "nvml_stub.c"
    command = [COMPILER, "-shared", "-fPIC", "-Wall", "-Werror", "-o", library, source]
    subprocess.run(command, check=True)
    return folder


@needs_compiler
def test_two_gpus_are_told_apart(stub):
    usage = child(SAMPLE, stub)
    large, small = usage["gpus"]
    assert (large["index"], large["name"]) == (0, "Stub Large")
    assert (small["index"], small["name"]) == (1, "Stub Small")
    assert (large["memory_total"], small["memory_total"]) == (80 * GIB, 8 * GIB)
    assert set(large["utilisation"]) == {90.0}
    assert set(small["utilisation"]) == {10.0}
    assert set(large["memory_used"]) == {60.0 * GIB}
    assert set(small["memory_used"]) == {1.0 * GIB}
    assert len(small["utilisation"]) == len(usage["seconds"]) > 2
    assert [gpu["utilisation"] for gpu in usage["summary"]["gpus"]] == [90, 10]
    assert [gpu["memory_used"] for gpu in usage["summary"]["gpus"]] == [60 * GIB, GIB]
    assert usage["gpu_message"] == ""
    assert usage["problems"] == {}
    assert usage["machine"]["gpus"] == ["Stub Large", "Stub Small"], "captions name them"


@needs_compiler
def test_a_gpu_that_vanishes_leaves_gaps_and_the_other_goes_on(stub):
    usage = child(SAMPLE, stub, STUB_LOSE_AFTER="3")
    large, small = usage["gpus"]
    assert len(usage["seconds"]) > 4
    assert small["utilisation"][:3] == [10.0] * 3
    assert all(math.isnan(percent) for percent in small["utilisation"][3:])
    assert set(large["utilisation"]) == {90.0}
    assert "GPU is lost" in usage["problems"]["GPU 1 utilisation"]
    assert usage["summary"]["gpus"][1]["utilisation"] == 10


@needs_compiler
def test_a_gpu_that_cannot_be_opened_does_not_hide_the_other(stub):
    usage = child(SAMPLE, stub, STUB_BROKEN="0")
    assert [(gpu["index"], gpu["name"]) for gpu in usage["gpus"]] == [(1, "Stub Small")]
    assert "GPU is lost" in usage["problems"]["GPU 0"]
    assert usage["machine"]["gpus"] == ["Stub Small"]


@needs_compiler
def test_nvml_is_shut_down_after_each_block_also_after_an_exception(stub):
    script = """
        import ctypes
        from labkit.instruments.usage_monitor import UsageMonitor
        counts = []
        usage = UsageMonitor(interval=0.01)
        for error in (None, RuntimeError()):
            try:
                with usage:
                    library = ctypes.CDLL("libnvidia-ml.so.1")
                    counts.append(library.stub_open_sessions())
                    if error:
                        raise error
            except RuntimeError:
                pass
            counts.append(library.stub_open_sessions())
        report(usage, counts=counts)
    """
    usage = child(script, stub)
    assert usage["counts"] == [1, 0, 1, 0]
    assert len(usage["gpus"]) == 2


@needs_compiler
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"STUB_GPUS": "0"}, "the NVIDIA driver shows no usable GPU"),
        ({"STUB_INIT": "9"}, "no NVIDIA driver here"),
        ({"STUB_INIT": "18"}, "RM has detected an NVML/RM version mismatch."),
    ],
    ids=["driver without GPU", "library without driver", "driver in trouble"],
)
def test_without_gpus_it_says_why(stub, settings, message):
    usage = child(SAMPLE, stub, **settings)
    assert usage["gpus"] == []
    assert usage["gpu_message"] == message
    assert "gpus" not in usage["machine"]
    assert len(usage["seconds"]) > 2


def test_without_a_driver_it_says_so():
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        pass
    else:
        pytest.skip("this machine has NVIDIA's driver")
    usage = child(SAMPLE)
    assert usage["gpus"] == []
    assert usage["gpu_message"] == "no NVIDIA driver here"
    assert usage["problems"] == {}


def test_without_the_bindings_it_says_what_to_install():
    script = """
        import sys
        sys.modules["pynvml"] = None
        from labkit.instruments.usage_monitor import UsageMonitor
        with UsageMonitor() as usage:
            pass
        report(usage, tensorflow="tensorflow" in sys.modules)
    """
    usage = child(script)
    assert "nvidia-ml-py" in usage["gpu_message"]
    assert usage["tensorflow"] is False
