"""What stands around the lessons: answers that are folded, predictions that are checked, links."""

import re
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
LESSONS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
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
            else:
                assert not folded


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_the_first_cell_says_what_it_takes_and_where_to_go_on(path):
    first = read(path).cells[0].source
    for words in ("**Reading**", "**running**", "**Afterwards you can**", "**You need**"):
        assert words in first
    place = LESSONS.index(path)
    for other in LESSONS[max(0, place - 1) : place] + LESSONS[place + 1 : place + 2]:
        assert f"]({other.name})" in first
    assert f"](ja/{path.stem[:2]}.md)" in first and "](README.md)" in first


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
    for path in (ROOT / "notebooks").glob("*.ipynb"):
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
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        assert "vnd.jupyter.widget" not in path.read_text(), "make it again: python -m tests.remake"
