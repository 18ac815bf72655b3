"""A notebook that fails is run once more, and the summary says so: its claims are measurements.
In every kernel the figures are checked for texts that are cut or lie on each other."""

import os
import re
import tempfile
from pathlib import Path

import pytest

from tests import figure_texts

_FIRST_FAILURE = "first failure"
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # else that of the process which started this one
        folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        os.environ["IPYTHONDIR"] = str(figure_texts.in_kernels(Path(folder.name)))
        config.add_cleanup(folder.cleanup)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    try:
        return (yield)
    except Exception as error:
        if not getattr(item, "nbmake", False):
            raise
        # While pytest captures, nothing shows: it is said in the summary, also of `-n 2`.
        item.user_properties.append((_FIRST_FAILURE, (item.path.name, _in_one_line(error))))
    return item.runtest()


def _in_one_line(error):
    """An assertion without a message is told by its source, which the traceback points at."""
    failed = getattr(error.args[0] if error.args else None, "error", None)
    if failed is None:
        return f"{type(error).__name__}: {error}"
    pointed_at = re.findall(r"^-+> *\d+ (.*)$", _COLOURS.sub("", failed.trace), re.MULTILINE)
    said = [_COLOURS.sub("", failed.summary), *pointed_at]
    return " <- ".join(line.strip() for line in said)


def pytest_terminal_summary(terminalreporter):
    reports = [report for many in terminalreporter.stats.values() for report in many]
    properties = [p for r in reports if getattr(r, "when", "") == "call" for p in r.user_properties]
    for name, failure in (text for key, text in properties if key == _FIRST_FAILURE):
        terminalreporter.write_sep("!", f"RUN TWICE: {name}", yellow=True, bold=True)
        terminalreporter.write_line(f"{name} failed and was run once more. It had failed with:")
        terminalreporter.write_line(failure, yellow=True)
