"""Each prediction of the lessons, with what its notebook found: what the check says to a right, a
nearly right, a wrong and an absurd answer. And a thread's death, as notebook 6 listens to it."""

import ast
import contextlib
import threading
from pathlib import Path

import nbformat
import pytest

LESSONS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("[0-9]*.ipynb"))
_UNTOLD = ": no answer yet; here it is "


def checks(path):
    """Of each cell that checks: its calls, and the lines that it wrote, unanswered as it came."""
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "code" and "labkit.check(" in cell.source:
            calls = [n for n in ast.walk(ast.parse(cell.source)) if isinstance(n, ast.Call)]
            calls = [n for n in calls if ast.unparse(n.func) == "labkit.check"]
            text = "".join(o.text for o in cell.outputs if o.output_type == "stream")
            yield calls, [line for line in text.splitlines() if _UNTOLD in line]


def predictions():
    for path in LESSONS:
        for calls, lines in checks(path):
            by_name = {c.args[0].value: c for c in calls if isinstance(c.args[0], ast.Constant)}
            (loop,) = [c for c in calls if not isinstance(c.args[0], ast.Constant)] or [None]
            for line in lines:
                name, found = line.split(_UNTOLD)
                yield pytest.param(
                    by_name.get(name, loop), found.removesuffix("."), id=f"{path.stem[:2]} {name}"
                )


def words(call):
    """What a call says besides name, answer and right answer: its unit and hint."""
    more = {k.arg: k.value for k in call.keywords}
    if len(call.args) > 3:
        more["unit"] = call.args[3]
    return {name: ast.literal_eval(value) for name, value in more.items()}


@pytest.mark.parametrize(("call", "found"), list(predictions()))
def test_a_prediction_is_told_right_near_wrong_and_absurd(call, found, capsys):
    import labkit

    more = words(call)

    def said(answer):
        labkit.check("it", answer, right, **more)
        return capsys.readouterr().out.removeprefix("it: ").removesuffix("\n")

    hint = more.get("hint", "")
    assert hint, "whoever is wrong gets something to think of"
    assert "my_" in ast.unparse(call) or "answer" in ast.unparse(call)
    try:
        right = float(found.removesuffix(more.get("unit", "")))
    except ValueError:
        right = found.split(", ")
        assert "unit" not in more, "words have none"
        near, wrong, absurd = right[1:], "nobody asked for this", 7
        verdicts = "right.", f"{len(set(near))} right, 0 ", "0 right, 1 ", "0 right, 1 "
        if len(right) == 1:
            near, verdicts = f" {found.upper()} ", ("right.", "right.", "not that.", "not that.")
    else:
        near, wrong, absurd = 1.3 * right or 1, 3 * right or 2, "a lot"
        verdicts = "right", "near: ", "not yet: ", "expected a number"
        if not right:
            verdicts = "right", "1 is not it.", "2 is not it.", "expected a number"
    assert said(None) == f"no answer yet; here it is {found}."
    for answer, expected in zip((right, near, wrong, absurd), verdicts, strict=True):
        text = said(answer)
        assert text.startswith(expected)
        assert text.endswith(hint) != expected.startswith("right")


def test_each_check_has_left_its_answer_in_what_is_committed():
    for path in LESSONS:
        found = list(checks(path))
        assert found
        for calls, lines in found:
            assert len(lines) >= len(calls), path.name
            names = {line.split(_UNTOLD)[0] for line in lines}
            plain = {c.args[0].value for c in calls if isinstance(c.args[0], ast.Constant)}
            assert plain <= names


def test_a_thread_that_leaves_by_sys_exit_writes_nothing_as_in_python_itself(capfd):
    (path,) = (path for path in LESSONS if path.stem.startswith("06"))
    (source,) = (
        c.source for c in nbformat.read(path, 4).cells if "def threads_listened" in c.source
    )
    listening = next(node for node in ast.parse(source).body if "listened" in ast.unparse(node))
    space = {"contextmanager": contextlib.contextmanager, "threading": threading}
    exec(ast.unparse(listening), space)

    def dying(error):
        def work():
            raise error

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    for error in (SystemExit(), OSError("truncated")):
        heard, hook = [], threading.excepthook
        with space["threads_listened_to"](heard):
            dying(error)
        assert threading.excepthook is hook
        threading.excepthook = threading.__excepthook__  # not pytest's
        try:
            dying(error)
        finally:
            threading.excepthook = hook
        assert bool(heard) == bool(capfd.readouterr().err) == isinstance(error, OSError)
