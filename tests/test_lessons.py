"""What stands around the lessons: answers that are folded, predictions that are checked, links, the
way from the web to a notebook that runs."""

import ast
import builtins
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from tests import address as addresses
from tests import sections

ROOT = Path(__file__).resolve().parents[1]
LESSONS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MADE_UP = "https://github.com/some-one/lab.kit"
PAGES = [*ROOT.glob("*.md"), *(ROOT / "notebooks").rglob("*.md")]


def read(path):
    return nbformat.read(path, 4)


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_prediction_has_a_cell_for_the_answer_which_is_checked(path):
    cells = read(path).cells
    (asked,) = (number for number, cell in enumerate(cells) if "## Your prediction" in cell.source)
    answers = cells[asked + 1]
    names = re.findall(r"\bmy_\w+", answers.source)
    assert answers.cell_type == "code" and names
    rest = "\n".join(cell.source for cell in cells[asked + 2 :] if cell.cell_type == "code")
    assert all(name in rest for name in names)
    assert rest.count("labkit.check(") >= 1
    # Nothing is typed in: all are None as they come, and so "no answer yet".
    space = {}
    exec(answers.source, space)
    for name in names:
        value = space[name]
        values = value.values() if isinstance(value, dict) else [value]
        assert all(one is None or set(one) == {None} for one in values)


def test_what_gives_an_answer_away_is_folded_and_nothing_else():
    for path in LESSONS:
        for cell in read(path).cells:
            folded = cell.metadata.get("jupyter", {})
            if "answer" in cell.metadata.get("tags", ()):
                assert folded == {"source_hidden": True, "outputs_hidden": True}
                assert "labkit.check(" in cell.source
            elif "experiment" in cell.metadata.get("tags", ()):
                assert folded == {"outputs_hidden": True}  # until the reader has predicted
            elif "install" in cell.metadata.get("tags", ()):
                assert folded == {"source_hidden": True}
            else:
                assert not folded
                # Its output has the right answer, and the figure below it may.
                assert "labkit.check(" not in cell.source, f"{path.name}: {cell.source[:60]}"


def asks(text):
    """Does a text end by asking what comes below it?"""
    text = re.sub(r"<details>.*?</details>|`[^`]*`", "", text, flags=re.DOTALL).rstrip()
    last = re.sub(r"\([^()]*\)$", "", text.split("\n\n")[-1]).rstrip()
    return last.endswith("?") or re.search(r"\bPredict\b", last) is not None


def tree(cell):
    return ast.walk(ast.parse(cell.source.replace("%matplotlib inline", "")))


def taken(nodes):
    """The names of variables that code takes from elsewhere."""
    names = [node for node in nodes if isinstance(node, ast.Name)]
    made = {node.id for node in names if isinstance(node.ctx, ast.Store)}
    return {n.id for n in names if not n.id.isupper() and not hasattr(builtins, n.id)} - made


def of_right_answers(cell):
    """The names that the right answers of a cell's checks are made of."""
    for call in tree(cell):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "labkit.check":
            right = call.args[2]
            while isinstance(right, ast.Subscript):  # of gain[label] not the label
                right = right.value
            yield from taken(ast.walk(right))


def spoiling(cells):
    """The cells whose open output shows what was to be predicted: they come right after a question,
    or take what a check takes for right. What comes under "What we saw" may."""
    code = [cell for cell in cells if cell.cell_type == "code"]
    right = {name for cell in code for name in of_right_answers(cell)}
    asked = False
    for number, cell in enumerate(cells):
        if "## What we saw" in cell.source:
            return
        if cell.cell_type == "markdown":
            asked = asks(cell.source)
            continue
        is_open = cell.outputs and not cell.metadata.get("jupyter", {}).get("outputs_hidden")
        if is_open and (asked or taken(tree(cell)) & right):
            yield number


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_no_open_output_shows_what_was_to_be_predicted(path):
    cells = read(path).cells
    assert not list(spoiling(cells))
    for cell in cells:
        cell.metadata.pop("jupyter", None)
    assert list(spoiling(cells)), "then it would"


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_the_first_cell_says_what_it_takes_and_where_to_go_on(path):
    first = read(path).cells[0].source
    for words in ("**Reading**", "**running**", "**Afterwards you can**", "**You need**"):
        assert words in first
    place = LESSONS.index(path)
    for other in LESSONS[max(0, place - 1) : place] + LESSONS[place + 1 : place + 2]:
        assert f"]({other.name})" in first
    assert f"](ja/{path.stem[:2]}.md)" in first and "](README.md)" in first


def test_every_figure_that_a_notebook_draws_is_kept_and_so_checked():
    for path in NOTEBOOKS:
        for cell in read(path).cells:
            drawn = len(re.findall(r"\bplots\.(?!keep\b)[a-z]+\(", cell.source))
            if cell.cell_type == "code":
                assert drawn == cell.source.count("plots.keep(figure, "), cell.source
                assert not re.search(r"\bFigure\(|\bsubplots\(|pyplot", cell.source)


def test_a_notebooks_minutes_and_seconds_are_told_by_section():
    book = nbformat.v4.new_notebook()
    code, text = nbformat.v4.new_code_cell, nbformat.v4.new_markdown_cell
    book.cells = [code(), text("# Title\none two"), text("more"), code(), text("## B\nx"), code()]
    assert sections.sections(book) == {"Title": (5, [3]), "B": (3, [5])}
    page = (ROOT / "notebooks" / "README.md").read_text()
    kept = json.loads(sections.RESULT.read_text()) if sections.RESULT.exists() else {}
    made_again = sections.written(page, sections.table(kept))
    assert page == made_again, "python -m tests.sections"
    path = LESSONS[0]
    names = list(sections.sections(read(path)))
    rows = sections.table({path.stem: {"seconds": dict.fromkeys(names, 12.3)}})
    assert re.search(r"Whole epochs \(\d+ min, 12 s\)", rows) and rows.count(" s)") < len(names)


def test_without_ray_the_committed_run_is_shown(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.chdir(ROOT / "notebooks")
    cells = read(ROOT / "notebooks" / "09_beyond_one_machine.ipynb").cells
    space = {}
    for cell in cells:
        if cell.cell_type == "code":
            exec(cell.source.replace("%matplotlib inline", ""), space)
    assert "Ray is not installed here" in capsys.readouterr().out
    assert space["run"] and space["once"]


def links(text):
    """Relative targets of Markdown links and images, outside of code."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    found = re.findall(r"\]\(([^)\s]+)\)", text)
    return [link.split("#")[0] for link in found if "://" not in link and not link.startswith("#")]


def test_every_link_leads_somewhere():
    texts = {page: page.read_text() for page in PAGES}
    for path in NOTEBOOKS:
        cells = read(path).cells
        texts[path] = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    dead = [
        f"{page.name}: {link}"
        for page, text in texts.items()
        for link in links(text)
        if not (page.parent / link).exists()
    ]
    assert sum(len(links(text)) for text in texts.values()) > 50
    assert not dead


def test_widgets_leave_their_pictures_alone_in_what_is_committed():
    for path in NOTEBOOKS:
        assert "vnd.jupyter.widget" not in path.read_text(), "make it again: python -m tests.remake"


# -- from the web ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_the_address_that_pyproject_has(path):
    text, known = path.read_text(), addresses.address()

    def written(address, text=text):
        book = addresses.addressed(nbformat.reads(text, 4), path.name, address)
        return book, nbformat.writes(book) + "\n"

    assert written(known)[1] == text, "python -m tests.address"
    first, install = read(path).cells[:2]
    assert ("Open in Colab" in first.source) == bool(addresses.badge(known, path.name))
    assert f'REPOSITORY = "{known}"' in install.source
    # With one, it is in both; to take it away again leaves no trace.
    book, other = written(MADE_UP)
    opened = f"/github/some-one/lab.kit/blob/main/notebooks/{path.name})"
    assert book.cells[0].source.split("\n")[2].endswith(opened)
    assert f'REPOSITORY = "{MADE_UP}"' in book.cells[1].source
    assert len(book.cells) == len(read(path).cells)
    assert written(known, other)[1] == text


def test_a_badge_is_drawn_where_colab_can_open_the_notebook():
    of_git = addresses.badge(f"{MADE_UP}.git", "a.ipynb")
    assert of_git == addresses.badge(MADE_UP, "a.ipynb") != ""
    assert addresses.badge("", "a.ipynb") == ""
    assert addresses.badge("https://example.org/some-one/labkit", "a.ipynb") == ""


def test_a_citation_gets_the_address_and_loses_it():
    text = (ROOT / "CITATION.cff").read_text()
    without = addresses.cited(text, "")
    assert addresses.cited(text, addresses.address()) == text
    known = addresses.cited(without, MADE_UP)
    assert f"\nrepository-code: {MADE_UP}\n" in known
    assert addresses.cited(known, "") == without and "repository-code" not in without


def test_the_install_cell_installs_where_labkit_is_missing_and_else_does_nothing(monkeypatch):
    calls = []
    monkeypatch.setattr(subprocess, "run", lambda *given, **named: calls.append((given, named)))

    def run(address, extra=""):
        space = {}
        exec(addresses.INSTALL.format(address=address, extra=extra), space)
        return space

    for address in ("", MADE_UP):
        assert "subprocess" not in run(address)  # not even imported
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"labkit is not installed.*pip install -e"):
        run("")
    assert not calls
    for extra in ("", "[ray]"):
        run(MADE_UP, extra)
        ((command,), named) = calls.pop()
        wanted = f"labkit{extra} @ git+{MADE_UP}"
        assert command == [sys.executable, "-m", "pip", "install", "--quiet", wanted]
        assert named == {"check": True} and not calls


def test_each_notebook_installs_what_it_needs():
    for path in NOTEBOOKS:
        book = addresses.addressed(read(path), path.name, MADE_UP)
        needs_ray = any(
            "cluster.local_nodes" in c.source for c in book.cells if c.cell_type == "code"
        )
        assert ("labkit[ray] @" in book.cells[1].source) == needs_ray, path.name
    assert (ROOT / "notebooks" / next(iter(addresses.EXTRA))).exists()
