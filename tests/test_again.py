"""The one thing that is ever run twice, a notebook that fails, and that it shows."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]


def count(name):
    """A program's first lines, which count its runs in a file."""
    return f"""from pathlib import Path
runs = Path("{name}_runs")
runs.write_text(runs.read_text() + "x" if runs.exists() else "x")
"""


@pytest.fixture
def folder(tmp_path):
    shutil.copy(ROOT / "conftest.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -p no:cacheprovider\n")
    return tmp_path


def run(folder, *options):
    command = [sys.executable, "-m", "pytest", "--nbmake", *options, "."]
    # So that what is left behind in the folder is the plugin's doing; it imports from our folder.
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=100
    )


def notebook(folder, name, claim):
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(count(name) + claim)])
    nbformat.write(book, folder / f"{name}.ipynb")


@pytest.mark.slow  # five kernels
def test_a_notebook_that_fails_runs_once_more_and_the_summary_says_so(folder):
    """One that fails twice fails, and a test that fails runs once."""
    notebook(folder, "lucky", "assert len(runs.read_text()) == 2")
    notebook(folder, "sound", "")
    notebook(folder, "wrong", "raise ValueError(f'failure {len(runs.read_text())}')")
    body = count("ordinary") + "def test_ordinary():\n    assert len(runs.read_text()) == 2\n"
    (folder / "test_ordinary.py").write_text(body)
    done = run(folder, "-n", "1")  # the summary is told by another process then
    assert done.returncode == 1 and "2 failed, 2 passed" in done.stdout, done.stdout
    runs = {path.stem: path.read_text() for path in folder.glob("*_runs")}
    assert runs == {"lucky_runs": "xx", "sound_runs": "x", "wrong_runs": "xx", "ordinary_runs": "x"}
    assert done.stdout.count("RUN TWICE") == 2
    assert all(f"!! RUN TWICE: {name}.ipynb !!" in done.stdout for name in ("lucky", "wrong"))
    assert "AssertionError: <- assert len(runs.read_text()) == 2" in done.stdout
    assert "ValueError: failure 1" in done.stdout and "failure 2" in done.stdout
    left = {path.name for path in folder.iterdir() if not path.name.endswith("_runs")}
    assert left == {"conftest.py", "pytest.ini", "lucky.ipynb", "sound.ipynb", "wrong.ipynb",
                    "test_ordinary.py"}  # fmt: skip
