"""labkit: see, measure and fix the most common reason why training is slow: it waits for data.

The public names are imported on first use, so that `import labkit` (and every worker process)
starts without TensorFlow.
"""

import os
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# TensorFlow reads it once, at its import: CUDA's and oneDNN's start-up lines stay off the screen. A
# value that is already set wins.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

__version__ = "0.1.0"

_HOME = {
    "load_mnist": "data",
    "MnistDataGenerator": "data",
    "sleep": "workloads",
    "busy_python": "workloads",
    "distort": "workloads",
    "QueueRunner": "queue_runner",
    "from_files": "sources",
    "WorkerError": "engine.messages",
    "Component": "engine.batches",
    "stage": "engine.stage",
    "build_model": "model",
    "model_fn": "model",
    "StepTimer": "instruments.step_timer",
    "UsageMonitor": "instruments.usage_monitor",
    "diagnose": "instruments.diagnosis",
    "load_report": "instruments.compare",
    "compare": "instruments.compare",
    "audit": "instruments.audit",
    "race": "instruments.race.track",
    "watch": "instruments.watch",
    "check": "instruments.answers",
    "Law": "instruments.slider",
}
# Modules by the names that they had, or have for short: each is the one, or all, that came of it.
_MOVED = {
    "monitor": ("instruments.step_timer", "instruments.usage_monitor"),
    "plots": ("instruments.plots",),
    "scaling": ("engine.auto",),
    "diagnosis": ("instruments.diagnosis", "instruments.audit", "instruments.laws"),
    "auditing": ("instruments.audit",),
}
_SUBMODULES = {
    "data",
    "keras",
    "workloads",
    "sources",
    "queue_runner",
    "model",
    "train",
    "machine",
    *_MOVED,
}

__all__ = sorted([*_HOME, "train"])


def __getattr__(name: str) -> Any:
    if name in _HOME:
        found = getattr(import_module(f"labkit.{_HOME[name]}"), name)
        globals()[name] = found  # to come here takes ten times as long as an idle `labkit.stage`
        return found
    if name in _SUBMODULES:
        return import_module(f"labkit.{name}")
    raise AttributeError(f"module 'labkit' has no attribute {name!r}")


def load_ipython_extension(ipython: Any) -> None:
    """What `%load_ext labkit` calls: adds `%diagnose` and `%%watch`."""
    import_module("labkit.instruments.magics").register(ipython)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOME) | _SUBMODULES)


class _CallableModule(ModuleType):
    __wrapped__: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__wrapped__(*args, **kwargs)


def callable_module(function: Callable[..., Any], name: str = "") -> None:
    """Makes the module of that name, or that of `function`, callable as the function.
    `labkit.train` is both: a module for `python -m`, and a function, before and after anything has
    imported the module."""
    name = name or function.__module__
    if name != "__main__":  # then it is a script, and nobody's module
        module: Any = sys.modules[name]
        module.__class__, module.__wrapped__ = _CallableModule, function


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
