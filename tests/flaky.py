"""Runs the tests that changed many times: does one of them fail by chance?

    python -m tests.flaky                  # changed since the last commit, 30 times
    python -m tests.flaky --since main     # changed since that commit

The second half of the runs shares the processor with loops that keep every core busy. Exit code 1
if any failed. Changes to what the tests import, and to conftest.py, are not followed.
"""

import argparse
import ast
import os
import re
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Set
from contextlib import ExitStack
from pathlib import Path

from labkit.machine import usable_cores

FILES = ":(glob)tests/**/test_*.py"
# A busy loop must not outlive us, not even if we are killed.
BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"


def _git(root: Path, *command: str) -> str:
    done = subprocess.run(["git", *command], cwd=root, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"python -m tests.flaky: {done.stderr.strip()}")
    return done.stdout


def changed_tests(root: Path, since: str) -> list[str]:
    """The tests that are to run, as pytest wants them named."""
    diff = ("diff", "--name-only", "--relative", "--no-renames", "-z", since, "--", FILES)
    changed = _git(root, *diff).split("\0")
    added = _git(root, "ls-files", "--others", "--exclude-standard", "-z", "--", FILES).split("\0")
    conftest = root / "tests/conftest.py"
    shared = set(re.findall(r"\w+", conftest.read_text())) if conftest.exists() else set()
    tests = []
    for path in sorted({*changed, *added} - {""}):
        if (root / path).exists():
            known = _git(root, "ls-tree", since, "--", path)
            before = _git(root, "show", f"{since}:./{path}") if known else ""
            names = changed_names(before, (root / path).read_text(), shared)
            tests += [f"{path}::{name}" for name in names]
    return tests


def changed_names(before: str, after: str, shared: Set[str] = frozenset()) -> list[str]:
    """The tests in `after` that are not the same in `before`, or use by name what is not.

    Any word counts as a use of that name, so that some tests run in vain and none is missed.
    """
    old, new = _statements(before), _statements(after)
    tests = [
        name
        for _, node in new
        if not isinstance(node, ast.Import | ast.ImportFrom)
        for name in _names_bound(node)
        if re.match("test|Test", name)
    ]
    texts = [{text for text, _ in statements} for statements in (old, new)]
    dirty = [(text, node) for text, node in old + new if text in texts[0] ^ texts[1]]
    names: set[str] = set()
    while dirty:
        for text, node in dirty:
            binds = _names_bound(node)
            if not binds or _reaches_every_test(text, node, shared):
                return tests
            names |= binds
        clean = [(text, node) for text, node in new if not _names_bound(node) <= names]
        dirty = [(text, node) for text, node in clean if names & set(re.findall(r"\w+", text))]
    return [name for name in tests if name in names]


def _statements(source: str) -> list[tuple[str, ast.stmt]]:
    """What stands at the left margin, with its decorators; no docstring of the file."""
    lines, found = source.splitlines(), []
    for node in ast.parse(source).body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        found.append(("\n".join(lines[first - 1 : node.end_lineno]), node))
    return found


def _names_bound(node: ast.stmt) -> set[str]:
    """The names that a statement defines; none if it does anything else."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {(name.asname or name.name).split(".")[0] for name in node.names} - {"*"}
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Assign | ast.AnnAssign):
        stored = [n for n in ast.walk(node) if isinstance(getattr(n, "ctx", None), ast.Store)]
        if not any(isinstance(n, ast.Attribute | ast.Subscript) for n in stored):
            return {n.id for n in stored if isinstance(n, ast.Name)}
    return set()


def _reaches_every_test(text: str, node: ast.stmt, shared: Set[str]) -> bool:
    """A hook or a mark for the file; a fixture that no test has to name, or by another name."""
    if any(re.match("pytest_|pytestmark", name) for name in _names_bound(node)):
        return True
    head = text.split("def ")[0]
    return "fixture" in head and (
        "autouse" in head or "name=" in head or bool(_names_bound(node) & shared)
    )


def run(root: Path, tests: list[str], timeout: float) -> tuple[set[str], dict[str, str]]:
    """Runs pytest once; returns the tests that ran, and the failures' texts."""
    with tempfile.TemporaryDirectory() as folder:
        report, log = Path(folder, "report.xml"), Path(folder, "log")
        command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider"]
        with log.open("w") as out:
            pytest = subprocess.Popen(
                [*command, f"--junitxml={report}", *tests],
                cwd=root, stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip
        try:
            status = str(pytest.wait(timeout))
        except subprocess.TimeoutExpired:
            status = f"time-out after {timeout:g} s"
        finally:
            if pytest.returncode is None:
                # With its children, or they would go on.
                os.killpg(pytest.pid, signal.SIGKILL)
                pytest.wait()
        ran: set[str] = set()
        failed: dict[str, str] = {}
        for case in ElementTree.parse(report).iter("testcase") if report.exists() else ():
            name = f"{case.get('classname')}::{case.get('name')}"
            ran.add(name)
            for wrong in (*case.findall("failure"), *case.findall("error")):
                failed.setdefault(name, wrong.text or wrong.get("message") or wrong.tag)
        if status not in ("0", "1") or (status == "1" and not failed):
            failed["pytest itself"] = f"ended with {status}\n{log.read_text()[-4000:]}"
    return ran, failed


def main(arguments: list[str] | None = None, root: Path = Path(__file__).parents[1]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.flaky", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--since", default="HEAD", help="a commit (default: HEAD)")
    parser.add_argument("--times", type=int, default=30, help="runs of each test (default: 30)")
    parser.add_argument("--timeout", type=float, default=600, help="seconds per run (default: 600)")
    options = parser.parse_args(arguments)
    tests = changed_tests(root, options.since)
    if not tests:
        print(f"no test has changed since {options.since}")
        return 0
    print(f"{options.times} times:", *tests, sep="\n  ", flush=True)
    counts: dict[bool, Counter[str]] = {False: Counter(), True: Counter()}
    first: dict[str, str] = {}  # the text of each test's first failure
    with ExitStack() as loops:
        for number in range(options.times):
            busy = number >= options.times // 2
            if number == options.times // 2:
                for _ in range(usable_cores()):
                    loop = loops.enter_context(subprocess.Popen([sys.executable, "-c", BUSY]))
                    loops.callback(loop.kill)
            ran, failed = run(root, tests, options.timeout)
            counts[busy].update(list(failed))
            first = dict.fromkeys(ran, "") | failed | {k: v for k, v in first.items() if v}
            print(f"run {number + 1}: {len(failed)} failed", flush=True)
    for name, text in sorted(first.items()):
        if text:
            print(f"\n{name}, its first failure:\n{text}")
    print("\nfailures (of them with busy cores):")
    for name in sorted(first):
        both = counts[False][name] + counts[True][name]
        print(f"{both:4d} ({counts[True][name]}) of {options.times}: {name}")
    return 1 if any(first.values()) else 0


if __name__ == "__main__":
    # pytest runs in a session of its own, which nobody else would end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
