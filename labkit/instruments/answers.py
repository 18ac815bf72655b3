"""Checks a learner's prediction against what a notebook measured or worked out."""

import math
from collections.abc import Collection
from typing import Any

_RIGHT, _NEAR = 0.10, 0.5  # of the larger of the two
_MISTAKEN = {
    1000: "a thousand times as much: milliseconds in place of seconds?",
    1 / 1000: "a thousandth of it: seconds in place of milliseconds?",
    100: "a hundred times as much: percent in place of a share from 0 to 1?",
    1 / 100: "a hundredth of it: a share in place of percent?",
}


def check(name: str, answer: Any, right: Any, unit: str = "", hint: str = "") -> None:
    """Prints whether a prediction is right, within what, or what to think of.

    It never raises, whatever the answer is, so that a notebook runs on; `None` is no answer.

    Args:
        name: what was asked, in a word.
        answer: a number, a word, or several words of which the order does not matter.
        right: what it should be, of the same kind: what was measured, or a formula of it.
        unit: of numbers.
        hint: printed where the answer is not right.
    """
    try:
        text = _judged(answer, right, unit)
        if hint and not text.startswith(("right", "no answer")):
            text += f" {hint}"
    except Exception as error:
        text = f"cannot be compared ({type(error).__name__}: {error})."
    print(f"{name}: {text}")


def _judged(answer: Any, right: Any, unit: str) -> str:
    if answer is None or answer is ...:
        return f"no answer yet; here it is {_told(right, unit)}."
    if _is_words(right):
        return _of_words(_words(answer), _words(right))
    return _of_numbers(answer, float(right), unit)


def _is_words(right: Any) -> bool:
    return isinstance(right, Collection) and not hasattr(right, "dtype")


def _words(value: Any) -> set[str]:
    if isinstance(value, str):
        return {value.strip().casefold()}
    if isinstance(value, Collection):
        return {str(word).strip().casefold() for word in value}
    return {str(value).casefold()}


def _of_words(answer: set[str], right: set[str]) -> str:
    if answer == right:
        return "right."
    wrong, missed = len(answer - right), len(right - answer)
    if len(right) == 1:
        return "not that."
    return f"{len(answer & right)} right, {wrong} that should not be there, {missed} missing."


def _of_numbers(answer: Any, right: float, unit: str) -> str:
    try:
        given = float(str(answer).strip().removesuffix(unit or " "))
    except ValueError:
        return f"expected a number{f' ({unit})' if unit else ''}, got {answer!r}."
    if not math.isfinite(given) or (given < 0 <= right):
        return f"cannot be {given:g}: expected a number from 0 up."
    if given == right:
        return f"right: {_told(right, unit)}."
    if not right or not given:
        return f"{given:g} is not it."
    off = abs(given - right) / max(abs(given), abs(right))
    if off <= _RIGHT:
        return f"right: within {max(off, 0.01):.0%} of {_told(right, unit)}."
    for factor, likely in _MISTAKEN.items():
        if abs(given / right / factor - 1) <= 2 * _RIGHT:
            return f"{given:g} is {likely}"
    if off <= _NEAR:
        return f"near: {given:g}, and it is {_told(right, unit)}."
    times = (
        f"{given / right:.2g} times too large" if given > right else f"{given / right:.2g} of it"
    )
    return f"not yet: {given:g} is {times}."


def _told(right: Any, unit: str) -> str:
    if isinstance(right, str):
        return right
    if _is_words(right):
        return ", ".join(map(str, right)) or "none"
    number = float(right)
    said = f"{number:.0f}" if number.is_integer() else f"{number:.3g}"
    return f"{said}{f' {unit}' if unit else ''}"
