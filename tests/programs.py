"""A Python program of its own, as a user's script is, with the labkit beside these tests."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_program(text, tmp_path, timeout=100, **environment):
    """Runs it to its end; the result has its stdout and stderr as text."""
    script = tmp_path / "program.py"
    script.write_text(textwrap.dedent(text))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    environment.pop("PYTHONUNBUFFERED", None)
    return subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment,
    )
