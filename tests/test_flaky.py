"""`python -m tests.flaky`: it finds the tests that changed, and those that fail by chance."""

import subprocess

import pytest

from tests import flaky

GOOD = "def test_good():\n    assert True\n"
# Its own count of runs makes it fail at every third, whatever else goes on.
EVERY_THIRD = """from pathlib import Path


def test_every_third():
    runs = Path("runs")
    runs.write_text(runs.read_text() + "x" if runs.exists() else "x")
    assert len(runs.read_text()) % 3, "by chance"
"""


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with one committed test, and a function that writes a file of tests."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # they take seconds to load

    def write(name, text):
        (tmp_path / "tests" / name).write_text(text)

    (tmp_path / "tests").mkdir()
    write("test_old.py", GOOD)
    for command in ("init -q", "add .", "-c user.name=a -c user.email=a@b commit -q -m first"):
        subprocess.run(["git", *command.split()], cwd=tmp_path, check=True)
    return tmp_path, write


def test_a_test_that_fails_by_chance_is_found_and_the_others_are_not(repository, capsys):
    root, write = repository
    write("test_new.py", EVERY_THIRD + "\n\n" + GOOD)
    assert flaky.main(["--times", "6"], root) == 1
    said = capsys.readouterr().out
    # The third run and, with busy cores, the sixth.
    assert "2 (1) of 6: tests.test_new::test_every_third\n" in said
    assert "0 (0) of 6: tests.test_new::test_good\n" in said
    assert "AssertionError: by chance" in said and said.count("its first failure") == 1
    assert "test_old" not in said


def test_a_test_that_passes_is_fine_and_runs_once_each_time(repository, capsys):
    root, write = repository
    write("test_old.py", GOOD.replace("assert True", "open('runs', 'a').write('x')"))
    assert flaky.main(["--times", "3"], root) == 0
    assert (root / "runs").read_text() == "xxx"
    assert "0 (0) of 3: tests.test_old::test_good\n" in capsys.readouterr().out


def test_nothing_changed(repository, capsys):
    assert flaky.main([], repository[0]) == 0
    assert capsys.readouterr().out == "no test has changed since HEAD\n"


def test_a_test_that_hangs_is_a_failure_and_so_is_a_file_that_does_not_import(repository, capsys):
    root, write = repository
    write("test_hangs.py", "import time\n\n\ndef test_hangs():\n    time.sleep(100)\n")
    assert flaky.main(["--times", "1", "--timeout", "2"], root) == 1
    assert "ended with time-out after 2 s" in capsys.readouterr().out
    write("test_hangs.py", "import no_such_module\n\n\ndef test_hangs():\n    pass\n")
    assert flaky.main(["--times", "1"], root) == 1
    assert "no_such_module" in capsys.readouterr().out


def test_a_commit_that_is_none_is_told_in_one_line(repository):
    with pytest.raises(SystemExit, match=r"python -m tests\.flaky: .*no_such"):
        flaky.main(["--since", "no_such"], repository[0])


def test_since_another_commit_counts_what_was_committed_and_what_was_not(repository):
    root, write = repository
    write("test_committed.py", GOOD)
    for command in ("add .", "-c user.name=a -c user.email=a@b commit -q -m second"):
        subprocess.run(["git", *command.split()], cwd=root, check=True)
    write("test_not_yet.py", GOOD)
    assert flaky.changed_tests(root, "HEAD") == ["tests/test_not_yet.py::test_good"]
    assert flaky.changed_tests(root, "HEAD~1") == [
        "tests/test_committed.py::test_good",
        "tests/test_not_yet.py::test_good",
    ]


FILE = '''"""Tests."""

import os

import pytest

TABLE = [1, 2]


@pytest.fixture
def made():
    return helper()


def helper():
    return 1


@pytest.fixture(autouse=True)
def always():
    started()


def started():
    pass


@pytest.mark.parametrize("x", [1, 2])
def test_a(x):
    assert x


@pytest.mark.parametrize("x", TABLE)
def test_b(x):
    assert x


def test_c(made):
    assert made


class TestD:
    def test_d(self):
        assert os.name
'''
ALL = ["test_a", "test_b", "test_c", "TestD"]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ('"""Tests."""', '"""More tests."""', []),
        ("def test_a(x):", "# a remark\n\n\ndef test_a(x):", ["test_a"]),
        ('"x", [1, 2]', '"x", [1, 3]', ["test_a"]),
        ("TABLE = [1, 2]", "TABLE = [1, 3]", ["test_b"]),
        ("def helper():\n    return 1", "def helper():\n    return 2", ["test_c"]),
        ("import os\n", "import sys as os\n", ["TestD"]),
        ("assert os.name", "assert os.sep", ["TestD"]),
        ("    started()", "    started() or 1", ALL),
        ("    pass", "    return", ALL),
        ("TABLE =", "pytestmark = []\nTABLE =", ALL),
        ("TABLE =", "os.environ['x'] = '1'\nTABLE =", ALL),
        ("TABLE =", "from os.path import *\nTABLE =", ALL),
        ("def made():", "def made(tmp_path):", ["test_c"]),
        ("@pytest.fixture\ndef made", "@pytest.fixture(name='x')\ndef made", ALL),
        ("def test_a(x):\n    assert x\n", "def test_a(x):\n    pass\n", ["test_a"]),
        ("def helper():\n    return 1\n", "", ["test_c"]),
        ("def test_c(made):\n    assert made\n", "", []),
    ],
)
def test_what_uses_a_change_runs_and_what_does_not_does_not(before, after, expected):
    assert before in FILE
    assert flaky.changed_names(FILE, FILE.replace(before, after, 1)) == expected


def test_a_fixture_that_stands_in_for_one_of_conftests_reaches_every_test():
    after = FILE.replace("def made():", "def made(tmp_path):")
    assert flaky.changed_names(FILE, after, {"made"}) == ALL


def test_every_test_of_a_new_file_has_changed():
    assert flaky.changed_names("", FILE) == ALL
