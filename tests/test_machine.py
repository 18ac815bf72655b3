"""What the machine grants: cores by affinity and quota, and whether TensorFlow uses oneDNN."""

import math
import os
import sys

import pytest

from labkit import machine
from labkit.machine import _cgroup_cores, describe_machine, fast_cpu, onednn_note, usable_cores

# -- cores ---------------------------------------------------------------------------------------


@pytest.fixture
def groups(tmp_path):
    """Makes a tree of control groups and a /proc/self/cgroup; returns the cores they grant."""

    def grant(own: str | None, **limits: str) -> float | None:
        for name, text in limits.items():
            path = tmp_path / "sys" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n")
        if own is not None:
            (tmp_path / "cgroup").write_text(own)
        return _cgroup_cores(tmp_path / "sys", tmp_path / "cgroup")

    return grant


def v1(group: str, quota: int, period: int = 100_000) -> dict[str, str]:
    return {f"{group}/cpu.cfs_quota_us": f"{quota}", f"{group}/cpu.cfs_period_us": f"{period}"}


SLURM = "0::/system.slice/slurmstepd.scope/job_7/step_0\n"
JOB = "system.slice/slurmstepd.scope/job_7"


def test_the_processes_own_group_sets_the_limit(groups):
    assert groups(SLURM, **{f"{JOB}/step_0/cpu.max": "250000 100000"}) == 2.5


def test_a_parent_that_grants_less_sets_the_limit(groups):
    limits = {f"{JOB}/step_0/cpu.max": "800000 100000", f"{JOB}/cpu.max": "300000 100000"}
    assert groups(SLURM, **limits, **{"system.slice/cpu.max": "max 100000"}) == 3.0


def test_a_child_that_grants_less_sets_the_limit(groups):
    limits = {f"{JOB}/step_0/cpu.max": "50000 100000", "system.slice/cpu.max": "300000 100000"}
    assert groups(SLURM, **limits) == 0.5


def test_a_neighbours_limit_is_none_of_ours(groups):
    assert groups(SLURM, **{"system.slice/other.service/cpu.max": "100000 100000"}) is None


def test_without_a_limit_there_is_none(groups):
    limits = {f"{JOB}/step_0/cpu.max": "max 100000", f"{JOB}/cpu.max": "max 100000"}
    assert groups(SLURM, **limits) is None
    assert groups("0::/\n") is None


def test_in_a_namespace_of_its_own_the_group_is_the_root(groups):
    assert groups("0::/\n", **{"cpu.max": "150000 100000"}) == 1.5


@pytest.mark.parametrize(
    "own", ["0::/../../machine.slice/other\n", "0::/docker/0123abcd\n"], ids=["outside", "host's"]
)
def test_a_path_that_is_not_to_be_seen_here_falls_back_to_the_root(groups, own, tmp_path):
    # The neighbour's file lies where a path with dots would lead.
    (tmp_path / "machine.slice/other").mkdir(parents=True)
    (tmp_path / "machine.slice/other/cpu.max").write_text("100000 100000\n")
    assert groups(own, **{"cpu.max": "700000 100000"}) == 7.0


V1 = "5:memory:/elsewhere\n3:cpu,cpuacct:/user.slice/job\n0::/init.scope\n"


def test_version_1_is_read_along_its_own_path(groups):
    limits = {**v1("cpu/user.slice/job", 400_000), **v1("cpu/user.slice", 300_000)}
    assert groups(V1, **limits, **v1("cpu", -1)) == 3.0
    # memory's path is not the processor's.
    assert groups(V1, **v1("cpu/elsewhere", 100_000)) == 3.0


def test_version_1_in_a_container_is_mounted_at_the_root(groups):
    assert groups(V1, **v1("cpu", 50_000)) == 0.5


def test_of_both_versions_the_least_counts(groups):
    limits = {**v1("cpu/user.slice/job", 400_000), "init.scope/cpu.max": "200000 100000"}
    assert groups(V1, **limits) == 2.0


@pytest.mark.parametrize("own", [None, "", "no colons\n", "0::\n"])
def test_without_a_readable_list_of_groups_the_root_is_asked(groups, own):
    assert groups(own, **{"cpu.max": "150000 100000"}) == 1.5


@pytest.mark.parametrize("text", ["", "max", "many 100000", "100000", "100000 0"])
def test_a_limit_that_cannot_be_read_is_passed_over(groups, text):
    limits = {f"{JOB}/step_0/cpu.max": text, f"{JOB}/cpu.max": "300000 100000"}
    assert groups(SLURM, **limits) == 3.0


def test_a_file_that_may_not_be_read_is_passed_over(groups, tmp_path):
    (tmp_path / "sys" / JOB / "cpu.max").mkdir(
        parents=True
    )  # reading it is an OSError for root too
    (tmp_path / "cgroup").mkdir()
    assert groups(None, **{"cpu.max": "150000 100000"}) == 1.5


@pytest.mark.parametrize(("quota", "cores"), [(0.5, 1), (1.9, 1), (None, 3), (64.0, 3)])
def test_cores_are_whole_at_least_one_and_no_more_than_the_affinity_mask(quota, cores, monkeypatch):
    monkeypatch.setattr(machine, "_cgroup_cores", lambda: quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    assert usable_cores() == cores


def test_a_machine_is_described_by_processor_cores_and_versions():
    described = describe_machine()
    assert set(described) - {"gpus"} == {
        "processor",
        "cores",
        "python",
        "tensorflow",
        "keras",
        "numpy",
    }
    assert described["cores"] == usable_cores() and described["processor"]
    assert all(described[name][0].isdigit() for name in ("python", "tensorflow", "numpy"))


def test_a_gpu_driver_in_trouble_costs_a_run_nothing(monkeypatch):
    import pynvml

    def fails():
        raise pynvml.NVMLError(pynvml.NVML_ERROR_UNKNOWN)

    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", fails)
    assert "gpus" not in describe_machine()


# -- oneDNN: what takes a program of its own is in test_imports.py and test_lifetime.py ----------

NAME = "TF_ENABLE_ONEDNN_OPTS"


@pytest.fixture
def variable(monkeypatch):
    """Sets the variable, or takes it away, until the test is over."""

    def put(value: str | None) -> None:
        monkeypatch.setenv(NAME, value or "")
        if value is None:
            monkeypatch.delenv(NAME)

    return put


@pytest.fixture
def without_tensorflow(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    monkeypatch.delitem(sys.modules, "tensorflow")


@pytest.mark.parametrize(("before", "after"), [(None, "1"), ("0", "0"), ("false", "false")])
def test_a_value_that_is_set_wins(before, after, variable, without_tensorflow):
    variable(before)
    fast_cpu()
    assert os.environ[NAME] == after


def test_once_tensorflow_is_there_it_changes_nothing(variable, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", object())
    variable(None)
    fast_cpu()
    assert NAME not in os.environ


OLD, NEW = "fma avx avx2", "fma avx2 avx512_vnni"


@pytest.fixture
def x86(monkeypatch):
    """A Linux machine with these processor flags."""

    def with_flags(flags: str) -> None:
        monkeypatch.setattr(machine, "_cpuinfo", lambda field: flags)

    monkeypatch.setattr(machine.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(machine.sys, "platform", "linux")
    return with_flags


@pytest.mark.parametrize(
    ("value", "flags", "told"),
    [
        (None, OLD, True),
        ("0", OLD, True),
        ("1", OLD, False),
        ("true", OLD, False),
        (None, NEW, False),
        ("1", NEW, False),
    ],
)
def test_the_note_comes_where_onednn_is_off_and_would_help(
    value, flags, told, variable, x86, without_tensorflow
):
    variable(value)
    x86(flags)
    note = onednn_note()
    assert (note is not None) == told
    assert note is None or note.startswith(f"oneDNN is off here: {NAME}=1, set before TensorFlow")


@pytest.mark.parametrize("on", [True, False])
def test_tensorflow_itself_is_asked_once_it_is_there(on, variable, x86, monkeypatch):
    from tensorflow.python.util import _pywrap_util_port

    monkeypatch.setattr(_pywrap_util_port, "IsMklEnabled", lambda: on)
    x86(OLD)
    variable("0" if on else "1")
    assert (onednn_note() is None) == on


def test_there_is_no_note_where_tensorflow_has_no_onednn(x86, monkeypatch):
    x86(OLD)
    monkeypatch.setattr(machine, "_onednn_is_on", lambda: False)
    assert onednn_note() is not None
    monkeypatch.setattr(machine.platform, "machine", lambda: "arm64")
    assert onednn_note() is None


def test_the_quota_read_here_is_none_or_a_number_above_zero():
    quota = _cgroup_cores()
    assert quota is None or (quota > 0 and math.isfinite(quota))
