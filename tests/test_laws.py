"""The laws of the design, held against the code: who may import whom, how large a thing may be.

An import counts wherever it stands, inside a function too. Only what runs as a script, under
`if __name__ == "__main__"`, is no import of the module.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import labkit

ROOT = Path(labkit.__file__).parent
# A file counts with all its lines; a function, or method, without its docstring but with what is
# defined inside; a class by the attributes that its own methods store on `self`: not those of its
# bases, of a class inside, or of a dataclass (its fields, and what `object.__setattr__` sets).
MOST = {"lines of a file": 400, "lines of a function": 60, "attributes of a class": 14}
MOST_OF_ALL, MOST_OF_THE_LESSON = 3900, 1000

# What is being rebuilt. Empty it all as that lands; nothing may be added.
EXCEPTIONS: dict[str, set[str]] = {
    "lines of a file": set(),
    "lines of a function": set(),
    "attributes of a class": set(),
}
# Of which the race has 1,600: a contestant is what a user of that library would write, so it cannot
# be shared; the law of files and functions holds for it as for all.
TOO_MUCH_IN_ALL, TOO_MUCH_IN_THE_LESSON = 11_848, 20

READ_FIRST = ("data", "workloads", "queue_runner", "model", "train")
LESSON = {*READ_FIRST, "cli"}
COMMON = {"machine", "checks", "quiet"}
# What a module may import of labkit: modules, or rooms by their name. The first line that fits.
LAW = [
    ({"checks", "quiet", "machine"}, set()),
    ({"data", "workloads"}, {"checks"}),
    ({"collate"}, {"engine"}),
    ({"sources"}, {"collate", "checks"}),
    ({"train"}, {"lesson", "engine", *COMMON, "instruments.history", "instruments.progress"}
     | {"instruments.step_timer", "checkpoint", "settings"}),
    ({"settings"}, {"engine", "checks"}),
    ({"cli"}, {"lesson", "engine", *COMMON, "instruments.plots", "checkpoint", "settings"}),
    ({"checkpoint"}, {"instruments.history", "instruments.keep", *COMMON}),
    ({"keras"}, {"lesson", "engine", "instruments.keep", "instruments.tap", *COMMON}),
    ({"passes"}, {"engine", *COMMON}),
    ({"queue_runner"}, {"lesson", "passes", "sources", "engine", *COMMON, "instruments.live"}),
    ({"diagnose"}, {"instruments.diagnosis"}),
    ({"race"}, {"instruments.race.track"}),
    ({"lesson"}, {"lesson", "sources", "engine", *COMMON}),
    ({"engine.tf_queue"}, {"engine", *COMMON}),
    ({"engine"}, {"engine", "machine", "checks"}),
    ({"instruments.plots"}, {"machine"}),
    ({"instruments.picture"}, {"instruments.plots"}),
    ({"instruments.live"}, {"engine", "instruments"}),
    ({"instruments.step_timer"}, {"quiet", "instruments.waiting"}),
    ({"instruments.history", "instruments.laws", "instruments.waiting"}, set()),
    ({"instruments.keep", "instruments.tap"}, set()),
    ({"instruments.progress"}, {"instruments.history", "quiet"}),
    ({"instruments"}, {"instruments", "lesson", "passes", "sources", "engine", *COMMON}),
]  # fmt: skip
# Packages that are not Python's own, where the law says which.
ONLY = [
    ({"checks"}, set()),
    ({"data", "workloads", "settings", "sources", "collate"}, {"numpy"}),
    # TensorFlow is asked about oneDNN, where it is imported already; NVML for the names of GPUs.
    ({"machine"}, {"tensorflow", "pynvml"}),
    ({"instruments.plots", "instruments.picture"}, {"numpy", "matplotlib"}),
    ({"instruments.history", "instruments.step_timer", "instruments.waiting"}, set()),
    ({"instruments.live", "instruments.magics"}, {"IPython"}),
    ({"instruments.fits"}, set()),
    ({"instruments.keep", "instruments.compare", "instruments.command"}, set()),
    ({"instruments.race.table", "instruments.race.command", "instruments.race.entry"}, set()),
    ({"instruments.race.work"}, {"numpy", "PIL", "cloudpickle"}),
    ({"engine.stage", "instruments.stages"}, set()),
    ({"instruments.laws", "instruments.audit", "instruments.reading"}, {"numpy"}),
]
TENSORFLOW = {"tensorflow", "keras"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {module_name(path): ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}
PATHS = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def room(module: str) -> str:
    return "lesson" if module in LESSON else module.split(".")[0]


def is_in(module: str, names: set[str]) -> bool:
    return module in names or room(module) in names


def import_nodes(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
        return
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield node
    for child in ast.iter_child_nodes(node):
        yield from import_nodes(child)


def imported(module: str) -> Iterator[str]:
    """The full names of what a module imports; of `from a import b`, `a.b`."""
    for node in import_nodes(TREES[module]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
            continue
        origin = node.module or ""
        if node.level:
            inside = ["labkit", *module.split(".")]
            is_package = PATHS[module].name == "__init__.py"
            above = inside[: len(inside) - node.level + is_package]
            origin = ".".join([*above, *([node.module] if node.module else [])])
        yield from (f"{origin}.{alias.name}" for alias in node.names)


def labkits(module: str) -> set[str]:
    """The modules of labkit that a module imports, wherever their names lead."""
    found = set()
    for name in imported(module):
        package, _, rest = name.partition(".")
        if package != "labkit" or not rest:
            continue
        first = rest.split(".")[0]
        if first in labkit._HOME:
            found.add(labkit._HOME[first])
        elif first in labkit._MOVED:
            found.update(labkit._MOVED[first])
        else:
            while rest and rest not in TREES:
                rest = rest.rpartition(".")[0]
            found.add(rest)
    return found - {"", module}


def others(module: str) -> set[str]:
    """The packages that a module imports, without Python's own and labkit."""
    packages = {name.split(".")[0] for name in imported(module)}
    return packages - set(sys.stdlib_module_names) - {"labkit"}


def law_of(module: str, table: list[tuple[set[str], set[str]]]) -> set[str] | None:
    return next((allowed for names, allowed in table if is_in(module, names)), None)


MODULES = [name for name in TREES if name not in ("", "engine", "instruments")]


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_its_room_may(module):
    allowed = law_of(module, LAW)
    assert allowed is not None, f"labkit/{module}.py has no room: give it one in DESIGN.md and here"
    assert not {name for name in labkits(module) if not is_in(name, allowed)}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_needs_only_the_packages_that_it_may(module):
    allowed = law_of(module, ONLY)
    assert allowed is None or others(module) <= allowed
    if room(module) == "engine" and module != "engine.tf_queue":
        assert not others(module) & {*TENSORFLOW, "matplotlib"}


def test_no_imports_run_in_a_circle():
    edges = {module: labkits(module) for module in TREES}
    done: set[str] = set()

    def follow(module: str, path: list[str]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for name in sorted(edges[module]):
                follow(name, [*path, module])
            done.add(module)

    for module in edges:
        follow(module, [])


def own_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes below, without those of classes inside."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.ClassDef):
            yield child
            yield from own_nodes(child)


def attributes(node: ast.ClassDef) -> set[str]:
    stored = (n for n in own_nodes(node) if isinstance(n, ast.Attribute))
    stores = (n for n in stored if isinstance(n.ctx, ast.Store) and isinstance(n.value, ast.Name))
    return {n.attr for n in stores if n.value.id == "self"}


def lines_of(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first, docstring = node.body[0], 0
    if ast.get_docstring(node) is not None:
        docstring = (first.end_lineno or 0) - first.lineno + 1
    return (node.end_lineno or 0) - node.lineno + 1 - docstring


def sizes(node: ast.AST, name: str) -> Iterator[tuple[str, str, int]]:
    """What is limited, where it stands, and how large it is."""
    for child in ast.iter_child_nodes(node):
        inside = f"{name}.{child.name}" if hasattr(child, "name") else name
        if isinstance(child, ast.ClassDef):
            yield "attributes of a class", inside, len(attributes(child))
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield "lines of a function", inside, lines_of(child)
        yield from sizes(child, inside)


def file_lines(module: str) -> int:
    return len(PATHS[module].read_text().splitlines())


@pytest.mark.parametrize("module", TREES)
def test_nothing_is_larger_than_a_reader_can_hold(module):
    found = [("lines of a file", module, file_lines(module)), *sizes(TREES[module], module)]
    too_large = [row for row in found if row[2] > MOST[row[0]] and row[1] not in EXCEPTIONS[row[0]]]
    assert not too_large


def test_labkit_as_a_whole_and_the_lesson_stay_small():
    assert sum(map(file_lines, TREES)) <= MOST_OF_ALL + TOO_MUCH_IN_ALL
    assert sum(map(file_lines, READ_FIRST)) <= MOST_OF_THE_LESSON + TOO_MUCH_IN_THE_LESSON


def test_each_dependency_stands_in_one_list_and_every_room_is_a_package():
    lines = (ROOT.parent / "requirements.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == ["-e .[lab]"]
    # setuptools finds packages, and passes over folders that are none.
    assert all((path.parent / "__init__.py").exists() for path in PATHS.values())


def test_a_worker_process_imports_neither_tensorflow_nor_matplotlib():
    from labkit import QueueRunner

    heavy = sorted({*TENSORFLOW, "matplotlib"})

    def factory():
        import sys

        # Of labkit, what a generator of the user's may well use.
        from labkit import MnistDataGenerator, StepTimer, audit, distort  # noqa: F401

        yield np.array([[name in sys.modules for name in heavy]])

    with QueueRunner(factory, 1, workers="process", capacity=1, min_after_dequeue=0) as runner:
        (loaded,) = [batch.numpy() for batch in runner.dataset()]
    assert not loaded.any(), dict(zip(heavy, loaded[0], strict=True))


# -- the laws are read rightly ---------------------------------------------------------------------


def test_sizes_are_counted_as_the_law_says():
    source = '''
class A(Base):
    field: int = 0

    def f(self, other):
        """One line
        and another."""
        self.a = self.b = 1
        self.c: int = 2
        self.d += 1
        other.e = self.read
        object.__setattr__(self, "set", 1)
        for self.f_ in ():
            pass

        class B:
            def g(self):
                self.inner = 1
'''
    found = {(what, where): size for what, where, size in sizes(ast.parse(source), "m")}
    assert found["attributes of a class", "m.A"] == 5
    assert found["attributes of a class", "m.A.f.B"] == 1
    assert found["lines of a function", "m.A.f"] == 12
    assert found["lines of a function", "m.A.f.B.g"] == 2


def test_imports_are_found_wherever_they_stand(monkeypatch):
    source = """
import numpy as np, os
from labkit import plots, WorkerError, workloads
def f():
    from . import step_timer
    from .history import Epoch
    from ..machine import usable_cores
    import labkit.model
if __name__ == "__main__":
    from labkit import cli
"""
    monkeypatch.setitem(TREES, "instruments.made_up", ast.parse(source))
    monkeypatch.setitem(PATHS, "instruments.made_up", ROOT / "instruments/made_up.py")
    assert labkits("instruments.made_up") == {
        "instruments.plots",
        labkit._HOME["WorkerError"],
        "workloads",
        "instruments.step_timer",
        "instruments.history",
        "machine",
        "model",
    }
    assert others("instruments.made_up") == {"numpy"}
