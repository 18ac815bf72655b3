"""Who runs: the list of contestants, and what the table tells of each from its own source."""

import ast
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import find_spec
from typing import Any

_MOST_PROCESSES = 8  # a core: more take longer to start than they run


@dataclass(frozen=True)
class Contestant:
    """A way of feeding: `run(row, n, lap)` calls `lap.step(*batch)` until that raises Finished.

    Attributes:
        name: as the table has it.
        run: its source, with no help from labkit's other code, is what a user would write. Its
            docstring tells the settings.
        package: whose version counts; "" for labkit's and Python's own.
        needs: a package that it takes beside that one.
        processes: its workers are processes.
        alone: it has no workers.
        own_number: it chooses their number itself.
        in_fit: Keras's fit takes the steps.
        graph: it builds the model into a graph of its own.
        before: seconds until its first batch, about, beyond those of a loop.
    """

    name: str
    run: Callable[..., None]
    package: str = ""
    needs: str = ""
    processes: bool = False
    alone: bool = False
    own_number: bool = False
    in_fit: bool = False
    graph: bool = False
    before: float = 0.0

    @property
    def setting(self) -> str:
        return " ".join((self.run.__doc__ or "").split())

    @property
    def lines(self) -> int:
        """Lines with code in the body, imports included, the docstring not."""
        source = textwrap.dedent(inspect.getsource(self.run))
        function = ast.parse(source).body[0]
        assert isinstance(function, ast.FunctionDef)
        body = function.body[1:] if ast.get_docstring(function) is not None else function.body
        lines = source.splitlines()[body[0].lineno - 1 : body[-1].end_lineno]
        return sum(bool(line.strip()) and not line.strip().startswith("#") for line in lines)

    @property
    def version(self) -> str:
        if not self.package:
            return ""
        try:
            return f"{self.package} {version(self.package)}"
        except PackageNotFoundError:  # it comes in parts of other names, as spdl_core and spdl_io
            parts = sorted(set(packages_distributions().get(self.package, ())))
            return ", ".join(f"{part} {version(part)}" for part in parts) or self.package

    def missing(self) -> str:
        """Why it cannot run on this machine; "" if it can."""
        absent = [name for name in (self.package, self.needs) if name and find_spec(name) is None]
        return f"{absent[0]} is not installed" if absent else ""

    def left_out(self, row: Any, n: int, cores: int, step: str) -> str:
        """Why it does not run in this row; "" if it does. `step`: "cnn", "keras", or another."""
        if self.missing():
            return self.missing()
        if self.processes and n > _MOST_PROCESSES * cores:
            return f"{n} processes on {cores} cores take longer to start than to run"
        if self.graph and (step != "cnn" or (row.trains and row.make(0)[0].dtype != "float32")):
            return "its graph is the CNN's, which takes float32"
        if self.in_fit and step not in ("cnn", "keras"):
            return "fit trains a Keras model, and the step is none"
        return ""


CONTESTANTS: dict[str, Contestant] = {}


def contestant(name: str, **traits: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Enters the function below it for the race."""

    def enter(run: Callable[..., None]) -> Callable[..., None]:
        CONTESTANTS[name] = Contestant(name, run, **traits)
        return run

    return enter
