"""labkit: see, measure and fix the most common reason why training is slow: it waits for data.

The public names are imported on first use, so that `import labkit` (and every worker process)
starts without TensorFlow.
"""

import importlib
import os
from typing import Any

# TensorFlow reads these once, at its import. The first keeps CUDA's and oneDNN's start-up lines off
# the screen; the second switches oneDNN on where TensorFlow leaves it off (no AVX-512 VNNI), which
# took this CNN from 65 to 190 steps/s there. Values that are already set win.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

__version__ = "0.1.0"

_HOME = {
    "load_mnist": "data",
    "MnistDataGenerator": "data",
    "sleep": "workloads",
    "busy_python": "workloads",
    "distort": "workloads",
    "QueueRunner": "queue_runner",
    "WorkerError": "engine.messages",
    "Component": "engine.batches",
    "build_model": "model",
    "model_fn": "model",
    "StepTimer": "monitor",
    "UsageMonitor": "monitor",
    "diagnose": "diagnosis",
    "audit": "diagnosis",
}
_SUBMODULES = {"data", "workloads", "queue_runner", "model", "monitor", "plots", "train"}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"labkit.{_HOME[name]}"), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"labkit.{name}")
    raise AttributeError(f"module 'labkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOME) | _SUBMODULES)
