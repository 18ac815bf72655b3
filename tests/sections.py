"""How long each section of a notebook takes, for whoever plans a class: notebooks/README.md.

    python -m tests.sections        # writes the table anew, from figures/sections.json

`python -m tests.remake`, which runs notebooks, calls it with what it measured. Reading: the minutes
that a notebook's first cell names, shared out by words.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import nbformat

from labkit.machine import describe_machine

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS, RESULT = ROOT / "notebooks", ROOT / "figures/sections.json"
BEGIN, END = "<!-- by python -m tests.sections -->\n", "<!-- until here -->\n"


def sections(book: nbformat.NotebookNode) -> dict[str, tuple[int, list[int]]]:
    """Of each heading, in order: how many words below it, and which cells hold code."""
    found: dict[str, tuple[int, list[int]]] = {}
    name = ""
    for number, cell in enumerate(book.cells):
        if cell.cell_type == "code":
            if name:  # else the folded cell that installs
                found[name][1].append(number)
            continue
        for part in re.split(r"(?m)^(?=##? )", cell.source):
            if heading := re.match(r"##? (.*)", part):
                name = heading[1]
            if name:
                words, cells = found.get(name, (0, []))
                found[name] = words + len(part.split()), cells
    return found


def keep(path: Path, took: Mapping[int, float]) -> None:
    """Keeps the seconds of a notebook's sections. `took`: of each cell that ran, by its number."""
    rows = sections(nbformat.read(path, 4))
    kept = json.loads(RESULT.read_text()) if RESULT.exists() else {"command": "tests.remake"}
    kept[path.stem] = {
        "machine": describe_machine(),
        "seconds": {
            name: round(sum(took.get(cell, 0.0) for cell in cells), 1)
            for name, (_, cells) in rows.items()
        },
    }
    RESULT.write_text(json.dumps(kept, indent=1) + "\n")


def table(kept: Mapping[str, Mapping]) -> str:
    lines = ["| notebook | its sections: minutes to read, seconds to run |", "|---|---|"]
    for path in sorted(NOTEBOOKS.glob("[0-9]*.ipynb")):
        book = nbformat.read(path, 4)
        rows = sections(book)
        minutes = re.search(r"\*\*Reading\*\* (\d+) minutes", book.cells[0].source)
        assert minutes, f"{path.stem}: its first cell does not say the minutes"
        words = sum(count for count, _ in rows.values())
        seconds = kept.get(path.stem, {}).get("seconds", {})
        texts = []
        for name, (count, cells) in rows.items():
            reading = int(minutes[1]) * count / words
            text = f"{reading:.0f} min" if reading >= 0.75 else "½ min"
            if cells and name in seconds:
                text += f", {seconds[name]:.0f} s"
            title = re.sub(r"^\d+\. ", "", name) if name == next(iter(rows)) else name
            texts.append(f"{title} ({text})")
        lines.append(f"| [{int(path.stem[:2])}]({path.name}) | {'; '.join(texts)} |")
    return "\n".join(lines) + "\n"


def written(page: str, rows: str) -> str:
    """The page with these rows between the marks."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + rows + END + rest.split(END)[1]


def main() -> None:
    page = NOTEBOOKS / "README.md"
    kept = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    page.write_text(written(page.read_text(), table(kept)))


if __name__ == "__main__":
    main()
