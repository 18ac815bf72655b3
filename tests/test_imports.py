"""The names under which readers know labkit's parts, wherever the parts live now."""

import gc
import importlib
import os
import subprocess
import sys

import pytest

import labkit

ONEDNN = "TF_ENABLE_ONEDNN_OPTS"


def alone(program: str) -> str:
    """What the program prints, in a Python of its own, with oneDNN left to TensorFlow."""
    environment = {name: value for name, value in os.environ.items() if name != ONEDNN}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# As README and the notebooks write them.
KNOWN = [
    "from labkit import QueueRunner, StepTimer, UsageMonitor, WorkerError, plots",
    "from labkit import plots; plots.bars, plots.OTHER",
    "import labkit; labkit.plots.bars",
    "import labkit.plots; labkit.plots.bars",
    "import labkit.monitor; labkit.monitor.StepTimer, labkit.monitor.UsageMonitor",
    "from labkit.monitor import StepTimer, UsageMonitor",
    "from labkit.data import Mnist, MnistDataGenerator, load_mnist",
    "from labkit.workloads import busy_python, distort, sleep",
    "from labkit.queue_runner import QueueRunner",
    "from labkit.scaling import usable_cores",
    "from labkit.diagnosis import bounds",
    "from labkit.train import History, describe_machine, train",
    "from labkit.model import model_fn",
    "import labkit; labkit.diagnose, labkit.audit, labkit.Component",
    "from labkit import race; import labkit; labkit.race",
]


@pytest.mark.parametrize("program", KNOWN)
def test_the_names_that_readers_know_are_there(program):
    # In this process too, which has all of them already.
    exec(program, {})


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_is_looked_for_afterwards_as_before(enabled):
    from labkit.quiet import _garbage_left

    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(ImportError), _garbage_left():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()


def test_a_moved_module_is_the_module_and_no_copy():
    from labkit import plots
    from labkit.instruments import plots as home

    assert plots is home and sys.modules["labkit.plots"] is home
    assert home.__spec__.name == "labkit.instruments.plots"


def test_a_module_that_became_two_gives_what_is_in_either():
    monitor = importlib.import_module("labkit.monitor")
    assert monitor.StepTimer is labkit.StepTimer
    assert monitor.UsageMonitor is labkit.UsageMonitor
    with pytest.raises(AttributeError, match=r"'labkit\.monitor' has no attribute 'Nothing'"):
        monitor.Nothing  # noqa: B018
    with pytest.raises(ImportError, match="Nothing"):
        exec("from labkit.monitor import Nothing")


def test_what_was_never_there_is_not_there():
    with pytest.raises(ModuleNotFoundError, match=r"labkit\.nothing"):
        importlib.import_module("labkit.nothing")
    with pytest.raises(AttributeError, match="'nothing'"):
        labkit.nothing  # noqa: B018


SMALL = "epochs=1, steps=1, delay=0, capacity=96, min_after_dequeue=0, progress=False"


@pytest.fixture(scope="module")
def of_a_program():
    """What a program that trains twice prints: one, since it takes seconds to start."""
    program = f"""
import labkit, inspect, os
first, diagnose = labkit.train({SMALL}, validate=False), labkit.diagnose
import labkit.train, labkit.diagnosis
again = labkit.train({SMALL}, validate=False)
from labkit.train import History, train
print(type(first) is type(again) is History, labkit.train.train is train)
print(inspect.signature(labkit.train) == inspect.signature(train))
print(labkit.diagnose is diagnose is labkit.diagnosis.diagnose)
import sys
def ours(): return [m for m in sys.modules if m.startswith('labkit')]
from labkit import machine
print(os.environ['{ONEDNN}'])
on = machine._onednn_is_on()
os.environ['{ONEDNN}'] = '0' if on else '1'
print(machine._onednn_is_on() == on)
import labkit.diagnose
try: labkit.diagnose([1], None)
except TypeError as error: print('line' if 'Write: labkit.from_files' in str(error) else error)
print(labkit.diagnose.diagnose is diagnose)
"""
    programs = "; ".join(f"[sys.modules.pop(m) for m in ours()]; {known}" for known in KNOWN)
    return alone(f"{program}{programs}; print('all')").split()


def test_train_is_a_function_also_behind_its_module_and_each_name_is_there_when_it_is_the_first(
    of_a_program,
):
    assert of_a_program[:4] == ["True"] * 4 and of_a_program[-1] == "all"
    assert of_a_program[6:8] == ["line", "True"]  # diagnose as well, behind its module


def test_labkits_own_training_asks_for_onednn_before_tensorflow_is_there(of_a_program):
    assert of_a_program[4] == "1"


def test_a_variable_set_after_tensorflow_has_read_it_deceives_nobody(of_a_program):
    assert of_a_program[5] == "True"


@pytest.mark.parametrize("first", ["import labkit.train", "from labkit.train import train"])
def test_labkit_train_is_a_function_when_its_module_came_first(first):
    program = f"{first}\nimport labkit\ntry: labkit.train(epochs=0)\nexcept ValueError: print(1)"
    assert alone(program) == "1"


def test_import_labkit_loads_no_heavy_package():
    heavy = "{'tensorflow', 'keras', 'matplotlib', 'psutil', 'numpy'}"
    assert alone(f"import sys, labkit; print({heavy} & set(sys.modules))") == "set()"
    timer = "import sys; from labkit import StepTimer"
    assert alone(f"{timer}; print({heavy} & set(sys.modules))") == "set()"


def test_the_race_imports_no_contestant_and_is_a_function_after_its_module_is_imported():
    program = """
import sys, labkit.race
print({'tensorflow', 'keras', 'torch', 'grain', 'spdl', 'ray'} & set(sys.modules))
try: labkit.race(rounds=0)
except ValueError: print(labkit.race.race is labkit.instruments.race.track.race)
"""
    assert alone(program).split() == ["set()", "True"]


def test_every_name_offered_is_there():
    for name in [*labkit.__all__, *dir(labkit)]:
        assert getattr(labkit, name) is not None
