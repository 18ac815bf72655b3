"""What the machine did during a run: CPU, memory, GPUs and probes, sampled in the background."""

import contextlib
import copy
import math
import os
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from numbers import Real
from typing import Any, Self

import psutil

_JOIN_SECONDS = 5.0

_Source = tuple[str, Callable[[], Any], list[float]]


@dataclass
class Gpu:
    """One GPU: utilisation in percent of the time, memory in bytes (the driver's own included).

    NaN stands where NVML gave no answer. `index` is NVML's, which counts every GPU in the machine
    in PCI order, whatever CUDA_VISIBLE_DEVICES says.
    """

    index: int
    name: str
    memory_total: float
    utilisation: list[float] = field(default_factory=list)
    memory_used: list[float] = field(default_factory=list)


class UsageMonitor:
    """Samples CPU, memory, GPUs and your own probes from a background thread.

        with UsageMonitor(interval=0.1, probes={"queue depth": runner.depth}) as usage:
            train()
        usage.summary()

    interval: seconds between samples. A late sample shifts none of those after it, and ticks that
    passed meanwhile are left out. CPU time is counted in steps of 0.01 s, so below 0.05 `cpu` is
    coarse. A block shorter than the interval gets one sample, at its end.
    probes: name -> function of no arguments that returns a number. It runs in the sampling thread,
    so its time counts towards `cost`.

    One entry per sample, NaN where there was no answer:
    seconds: since the block began.
    cpu: percent of the cores this process may run on (its affinity mask), all programs together. A
        container's CPU quota is invisible to it: there, `process_cpu` against the quota says more.
    process_cpu: cores kept busy by this process; worker processes are not in it, but are in `cpu`.
    memory: bytes of RAM that this process holds (RSS); worker processes are not in it.
    gpus: a list of `Gpu`. When it is empty, `gpu_message` says why.
    probes: name -> list.

    problems: source -> the first error it gave. cost: share of one core that the sampling took.
    Entering again starts afresh. Raises ValueError for a wrong interval or probe, and RuntimeError
    when entered while it is still sampling.
    """

    def __init__(
        self, interval: float = 0.1, probes: Mapping[str, Callable[[], float]] | None = None
    ) -> None:
        number = isinstance(interval, Real) and not isinstance(interval, bool)
        if not number or not 0 < interval <= threading.TIMEOUT_MAX:
            raise ValueError(
                f"UsageMonitor: interval must be a number of seconds above 0, got {interval!r}"
            )
        if not isinstance(probes or {}, Mapping):
            raise ValueError(
                "UsageMonitor: probes must map a name to a function, such as "
                f'{{"queue depth": runner.depth}}, got {probes!r}'
            )
        for name, probe in (probes or {}).items():
            if not callable(probe):
                raise ValueError(f"UsageMonitor: probe {name!r} must be a function, got {probe!r}")
        self.interval = float(interval)
        self._questions = dict(probes or {})
        self._thread: threading.Thread | None = None
        self._nvml: Any = None
        self._clear()

    def _clear(self) -> None:
        self.seconds: list[float] = []
        self.cpu: list[float] = []
        self.process_cpu: list[float] = []
        self.memory: list[float] = []
        self.probes: dict[str, list[float]] = {name: [] for name in self._questions}
        self.gpus: list[Gpu] = []
        self.gpu_message = ""
        self.problems: dict[str, str] = {}
        self.cost = math.nan

    def __enter__(self) -> Self:
        if self._thread is not None and self._thread.is_alive():
            raise RuntimeError("UsageMonitor: already sampling; use one monitor per block")
        self._clear()
        process = psutil.Process()
        sources: list[_Source] = [
            ("cpu", _machine_percent(), self.cpu),
            ("process_cpu", _process_cores(), self.process_cpu),
            ("memory", lambda: process.memory_info().rss, self.memory),
            *((name, ask, self.probes[name]) for name, ask in self._questions.items()),
            *self._open_gpus(),
        ]
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(sources,), name="labkit-usage", daemon=True
        )
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        try:
            assert self._thread is not None
            self._thread.join(_JOIN_SECONDS)
            if self._thread.is_alive():
                self.problems["sampler"] = f"still busy {_JOIN_SECONDS:g} s after the end: a probe?"
        finally:
            nvml, self._nvml = self._nvml, None
            if nvml is not None:
                with contextlib.suppress(nvml.NVMLError):
                    nvml.nvmlShutdown()

    def _run(self, sources: list[_Source]) -> None:
        start, spent = time.perf_counter(), time.thread_time()
        # psutil compares with the same thread's last call, so the first one has to be made here.
        self._ask("cpu", sources[0][1])
        ending = False
        while not ending:
            elapsed = time.perf_counter() - start
            # Ticks are multiples of the interval from the start, so lateness never adds up.
            tick = (math.floor(elapsed / self.interval) + 1) * self.interval
            ending = self._stop.wait(tick - elapsed)
            if not ending or not self.seconds:
                now = time.perf_counter() - start
                row = [self._ask(name, question) for name, question, _ in sources]
                for value, (_, _, samples) in zip(row, sources, strict=True):
                    samples.append(value)
                # Last, so that whoever plots while we sample finds len(seconds) values everywhere.
                self.seconds.append(now)
            self.cost = (time.thread_time() - spent) / (time.perf_counter() - start)

    def _ask(self, name: str, question: Callable[[], Any]) -> float:
        try:
            return float(question())
        except Exception as error:
            self.problems.setdefault(name, f"{type(error).__name__}: {error}")
            return math.nan

    def _open_gpus(self) -> list[_Source]:
        try:
            import pynvml as nvml
        except ImportError:
            self.gpu_message = "no NVML bindings here: pip install nvidia-ml-py"
            return []
        sources: list[_Source] = []
        try:
            nvml.nvmlInit()
            self._nvml = nvml
            for index in range(nvml.nvmlDeviceGetCount()):
                sources += self._open_gpu(nvml, index)
            self.gpu_message = "" if self.gpus else "the NVIDIA driver shows no usable GPU"
        except nvml.NVMLError as error:
            absent = (nvml.NVML_ERROR_LIBRARY_NOT_FOUND, nvml.NVML_ERROR_DRIVER_NOT_LOADED)
            self.gpu_message = "no NVIDIA driver here" if error.value in absent else str(error)
        return sources

    def _open_gpu(self, nvml: Any, index: int) -> list[_Source]:
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            name = nvml.nvmlDeviceGetName(handle)
        except nvml.NVMLError as error:
            # One broken GPU must not hide the others.
            self.problems[f"GPU {index}"] = str(error)
            return []
        memory = partial(nvml.nvmlDeviceGetMemoryInfo, handle)
        gpu = Gpu(index, name, self._ask(f"GPU {index} memory", lambda: memory().total))
        self.gpus.append(gpu)
        # Asked apart, since a GPU split by MIG has memory to tell but no utilisation.
        rates = partial(nvml.nvmlDeviceGetUtilizationRates, handle)
        return [
            (f"GPU {index} utilisation", lambda: rates().gpu, gpu.utilisation),
            (f"GPU {index} memory", lambda: memory().used, gpu.memory_used),
        ]

    def as_dict(self) -> dict[str, Any]:
        """Every sample in plain lists and dicts, in the units above; json.dump takes it as it is
        and writes missing values as NaN."""
        names = "interval seconds cpu process_cpu memory probes gpu_message problems cost"
        plain = {name: copy.deepcopy(getattr(self, name)) for name in names.split()}
        return {**plain, "gpus": [asdict(gpu) for gpu in self.gpus]}

    def __repr__(self) -> str:
        """A line of what was seen: means, the peak of memory, the median of each probe."""
        if not self.seconds:
            return "UsageMonitor: no samples yet"
        seen = self.summary()
        gpus = [f"GPU {g['index']} {g['name']} {_said(g['utilisation'])}%" for g in seen["gpus"]]
        parts = [
            f"{seen['samples']} samples in {self.seconds[-1]:.1f} s",
            f"CPU {_said(seen['cpu'])}%",
            f"this process {_said(seen['process_cpu'])} cores",
            f"at most {_said(seen['memory'] / 1e6)} MB",
            *(gpus or [self.gpu_message]),
            *(f"{name} {_said(value)}" for name, value in seen["probes"].items()),
            *(f"no answer from {name} ({error})" for name, error in seen["problems"].items()),
        ]
        return f"UsageMonitor: {', '.join(parts)}"

    def summary(self) -> dict[str, Any]:
        """One number for each series, in the same units: the mean of cpu, process_cpu and GPU
        utilisation, the peak of memory, the median of probes. Missing values are left out."""
        return {
            "samples": len(self.seconds),
            "cpu": _over(statistics.fmean, self.cpu),
            "process_cpu": _over(statistics.fmean, self.process_cpu),
            "memory": _over(max, self.memory),
            "probes": {name: _over(statistics.median, row) for name, row in self.probes.items()},
            "gpus": [
                {
                    **asdict(gpu),
                    "utilisation": _over(statistics.fmean, gpu.utilisation),
                    "memory_used": _over(max, gpu.memory_used),
                }
                for gpu in self.gpus
            ],
            "gpu_message": self.gpu_message,
            "problems": dict(self.problems),
            "cost": self.cost,
        }


def _machine_percent() -> Callable[[], float]:
    if not hasattr(os, "sched_getaffinity"):
        return psutil.cpu_percent
    allowed = os.sched_getaffinity(0)
    # The total is one line of /proc/stat; a line per core costs more on a machine with many.
    if len(allowed) == os.cpu_count():
        return psutil.cpu_percent

    def percent() -> float:
        cores = psutil.cpu_percent(percpu=True)
        return statistics.fmean(cores[core] for core in allowed)

    return percent


def _process_cores() -> Callable[[], float]:
    last = time.process_time(), time.perf_counter()

    def cores() -> float:
        nonlocal last
        (busy, then), last = last, (time.process_time(), time.perf_counter())
        return (last[0] - busy) / (last[1] - then)

    return cores


def _said(value: float) -> str:
    return "unknown" if math.isnan(value) else f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def _over(statistic: Callable[[list[float]], float], samples: list[float]) -> float:
    present = [sample for sample in samples if not math.isnan(sample)]
    return statistic(present) if present else math.nan
