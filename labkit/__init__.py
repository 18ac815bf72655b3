"""labkit: see, measure and fix the most common reason why training is slow: it waits for data.

The public names are imported on first use, so that `import labkit` (and every worker process)
starts without TensorFlow.
"""

import os
import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
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
    "WorkerError": "workers",
    "Component": "workers",
    "build_model": "model",
    "model_fn": "model",
    "StepTimer": "instruments.step_timer",
    "UsageMonitor": "instruments.usage_monitor",
    "diagnose": "diagnosis",
    "audit": "diagnosis",
}
# Modules by the names that they had, or have for short: each is the one, or all, that came of it.
_MOVED = {
    "monitor": ("instruments.step_timer", "instruments.usage_monitor"),
    "plots": ("instruments.plots",),
}
_SUBMODULES = {"data", "workloads", "workers", "queue_runner", "model", "train", *_MOVED}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"labkit.{_HOME[name]}"), name)
    if name in _SUBMODULES:
        return import_module(f"labkit.{name}")
    raise AttributeError(f"module 'labkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOME) | _SUBMODULES)


class _Moved:
    """Finds the modules of `_MOVED`."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        package, _, old = name.rpartition(".")
        return ModuleSpec(name, self) if package == __name__ and old in _MOVED else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__.rpartition(".")[2]
        homes = [import_module(f"labkit.{home}") for home in _MOVED[old]]
        if len(homes) == 1:
            sys.modules[module.__name__] = homes[0]  # the module itself, not a copy of its names
            return

        def find(name: str) -> Any:
            for home in homes:
                if hasattr(home, name):
                    return getattr(home, name)
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        module.__getattr__ = find  # type: ignore[method-assign]


# First, since another copy of labkit that is installed may still have the old files.
sys.meta_path.insert(0, _Moved())
