"""Runs notebooks and keeps their outputs and figures, as they are committed.

    python -m tests.remake notebooks/0*.ipynb

It measures, so nothing else should run. A figure with a text that is cut, or lies on another, ends
it. Left out is what changes by itself or means nothing without a kernel: times of cells, the state
of widgets. Prints the seconds that each notebook took; those of its sections are
kept for `tests.sections`.
"""

import os
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from tests import figure_texts, sections

ROOT = Path(__file__).resolve().parents[1]
_WIDGET = "application/vnd.jupyter.widget-view+json"


def without_widgets(book: nbformat.NotebookNode) -> None:
    """Leaves the pictures that widgets have beside them; those that have none go."""
    book.metadata.pop("widgets", None)
    for cell in book.cells:
        kept = []
        for output in cell.get("outputs", ()):
            shown = output.get("data", {}).pop(_WIDGET, None)
            if shown is None or "image/png" in output["data"]:
                kept.append(output)
        if "outputs" in cell:
            cell.outputs = kept


def seconds(cell: nbformat.NotebookNode) -> float:
    """How long a cell ran; takes that out of it."""
    when = cell.metadata.pop("execution", {})
    began, ended = (
        datetime.fromisoformat(when[name]) if name in when else None
        for name in ("iopub.execute_input", "shell.execute_reply")
    )
    return (ended - began).total_seconds() if began and ended else 0.0


def remake(path: Path) -> None:
    book = nbformat.read(path, 4)
    client = NotebookClient(
        book,
        timeout=600,
        store_widget_state=False,
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute()
    without_widgets(book)
    took = {number: seconds(cell) for number, cell in enumerate(book.cells)}
    path.write_text(nbformat.writes(book) + "\n")
    sections.keep(path, took)


def main() -> None:
    os.environ["LABKIT_SAVE_FIGURES"] = str(ROOT / "figures")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ["IPYTHONDIR"] = str(figure_texts.in_kernels(Path(folder)))
        for path in map(Path, sys.argv[1:]):
            began = time.monotonic()
            remake(path)
            print(f"{path.stem}: {time.monotonic() - began:.0f} s", flush=True)
    sections.main()


if __name__ == "__main__":
    main()
