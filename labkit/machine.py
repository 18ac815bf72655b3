"""The machine that a run has: cores it may use, processor and versions, oneDNN. No TensorFlow."""

import contextlib
import math
import os
import platform
import sys
from pathlib import Path, PurePosixPath
from typing import Any

_ONEDNN = "TF_ENABLE_ONEDNN_OPTS"
# With one of these TensorFlow switches oneDNN on by itself (its core/util/port.cc).
_NEURAL_FEATURES = {"avx512_vnni", "avx512_bf16", "avx_vnni", "amx_tile", "amx_int8", "amx_bf16"}


def usable_cores() -> int:
    """Processor cores this process may use: the affinity mask and the container's quota, not the
    number installed. At least 1.

    Sources: sched_getaffinity(2); cgroup v2 `cpu.max`, cgroup v1 `cpu.cfs_quota_us`, the least from
    the process's own group (/proc/self/cgroup) up to the root.
    """
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    quota = _cgroup_cores()
    return max(1, min(cores, math.floor(quota)) if quota else cores)


def _cgroup_cores(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> float | None:
    # By controller; v2 has the empty name. Inside a container the path may be that of the host, and
    # the group itself be mounted as the root, so the root is always asked too.
    groups = {"": "/", "cpu": "/"}
    with contextlib.suppress(OSError, ValueError):
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            groups.update(dict.fromkeys(controllers.split(","), path))
    limits = []
    for controller, quota_of in (("", _quota_v2), ("cpu", _quota_v1)):
        group = PurePosixPath(groups[controller].lstrip("/"))
        if ".." in group.parts:  # outside of the namespace that this process sees
            group = PurePosixPath()
        for level in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
                quota, period = quota_of(root / controller / level)
                if quota not in ("max", "-1"):
                    limits.append(float(quota) / float(period))
    return min(limits, default=None)


def _quota_v2(group: Path) -> list[str]:
    return (group / "cpu.max").read_text().split()[:2]


def _quota_v1(group: Path) -> list[str]:
    return [(group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period")]


def describe_machine() -> dict[str, Any]:
    """Processor, usable cores, NVIDIA GPUs where there are any, and versions: what a reader needs
    beside a figure."""
    # Here, since each worker process imports this file, and with it a tenth as much as NumPy.
    from importlib.metadata import PackageNotFoundError, version

    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    return {
        "processor": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "cores": usable_cores(),
        **({"gpus": gpus} if (gpus := _gpus()) else {}),
        "python": platform.python_version(),
        **{name: installed(name) for name in ("tensorflow", "keras", "numpy")},
    }


def _gpus() -> list[str]:
    """Their names, as NVML has them; none where there is no NVML, no driver or no GPU."""
    names = []
    # Whatever a driver that is half installed raises, wherever: this is but a caption.
    with contextlib.suppress(Exception):
        import pynvml as nvml

        nvml.nvmlInit()
        for index in range(nvml.nvmlDeviceGetCount()):
            with contextlib.suppress(nvml.NVMLError):  # one that is broken hides no other
                names.append(nvml.nvmlDeviceGetName(nvml.nvmlDeviceGetHandleByIndex(index)))
        nvml.nvmlShutdown()
    return names


def _cpuinfo(field: str) -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == field:
                return value.strip()
    return ""


def fast_cpu() -> None:
    """Has TensorFlow use oneDNN, which it leaves off on processors without AVX-512 VNNI: on one of
    those this took labkit's CNN from 65 to 190 steps/s. Results differ in the last digits.

    Only before TensorFlow is imported, which reads TF_ENABLE_ONEDNN_OPTS once; later, and where
    that variable is already set, it changes nothing.
    """
    if "tensorflow" not in sys.modules:
        os.environ.setdefault(_ONEDNN, "1")


def onednn_note() -> str | None:
    """A sentence for a report where oneDNN is off and would help; None where it is on, where
    TensorFlow decides for it by itself (AVX-512 VNNI and later), and where there is none."""
    if platform.machine() != "x86_64" or sys.platform != "linux":
        return None
    if _onednn_is_on() or _NEURAL_FEATURES & set(_cpuinfo("flags").split()):
        return None
    return (
        f"oneDNN is off here: {_ONEDNN}=1, set before TensorFlow is imported, makes small "
        "convolutions up to 2.6 times as fast on processors such as this one."
    )


def _onednn_is_on() -> bool:
    if "tensorflow" in sys.modules:
        # The variable may have changed since TensorFlow read it.
        with contextlib.suppress(ImportError, AttributeError):
            from tensorflow.python.util import _pywrap_util_port

            return bool(_pywrap_util_port.IsMklEnabled())
    return os.environ.get(_ONEDNN, "").lower() in ("1", "true")
