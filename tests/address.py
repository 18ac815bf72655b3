"""Writes the repository's address, which stands in pyproject.toml alone, wherever it is told.

    python -m tests.address

Each notebook gets, after its title, a badge that opens it in Colab, where the address is one of
GitHub, and a first code cell, folded, that installs labkit where it is missing; CITATION.cff gets
`repository-code`. Without an address there is no badge, and that cell says what to do. It changes
nothing where all is as it should be, and runs no notebook.
"""

import re
import tomllib
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
_COLAB = "https://colab.research.google.com"
_BADGE = f"[![Open in Colab]({_COLAB}/assets/colab-badge.svg)]"
INSTALL = """\
# Where labkit is installed, this does nothing.
from importlib.util import find_spec

REPOSITORY = "{address}"  # from pyproject.toml, by `python -m tests.address`
if find_spec("labkit") is None:  # on Colab, say
    import subprocess, sys

    if not REPOSITORY:
        raise ImportError("labkit is not installed, and this copy does not know from where. "
                          "In a terminal: pip install -e 'path/to/clone[lab]'; then restart.")
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, f"labkit{extra} @ git+{{REPOSITORY}}"], check=True)"""
EXTRA = {"09_beyond_one_machine.ipynb": "[ray]"}  # what a notebook needs besides


def address() -> str:
    """Of the repository, without a slash at its end; "" while it has none."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project.get("urls", {}).get("Repository", "").rstrip("/")


def badge(address: str, name: str) -> str:
    """The line for the notebook of that name; "" where Colab could not open it."""
    found = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)(\.git)?", address)
    return f"{_BADGE}({_COLAB}/github/{found[1]}/blob/main/notebooks/{name})" if found else ""


def addressed(book: nbformat.NotebookNode, name: str, address: str) -> nbformat.NotebookNode:
    """The notebook, changed in place, with badge and install cell as they belong to the address."""
    first, *rest = book.cells
    title, *lines = first.source.split("\n")
    while lines and (not lines[0] or lines[0].startswith(_BADGE)):
        del lines[0]
    shown = badge(address, name)
    first.source = "\n".join([title, "", *([shown, ""] if shown else []), *lines])
    if "install" in rest[0].metadata.get("tags", ()):
        cell, *rest = rest
    else:
        cell = nbformat.v4.new_code_cell()
        cell.id = f"{first.id.partition('-')[0]}-install"
    cell.metadata = nbformat.from_dict({"jupyter": {"source_hidden": True}, "tags": ["install"]})
    cell.source = INSTALL.format(address=address, extra=EXTRA.get(name, ""))
    book.cells = [first, cell, *rest]
    return book


def cited(text: str, address: str) -> str:
    """CITATION.cff with that address."""
    text = re.sub(r"^repository-code: .*\n", "", text, flags=re.MULTILINE)
    line = f"repository-code: {address}\n" if address else ""
    return re.sub(r"^(version: .*\n)", lambda found: found[1] + line, text, flags=re.MULTILINE)


def main() -> None:
    known = address()
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        book = addressed(nbformat.read(path, 4), path.name, known)
        path.write_text(nbformat.writes(book) + "\n")
    citation = ROOT / "CITATION.cff"
    citation.write_text(cited(citation.read_text(), known))


if __name__ == "__main__":
    main()
