"""`labkit.check`: what it says to a right, a nearly right, a wrong and an absurd answer."""

import math

import numpy as np
import pytest

import labkit


@pytest.fixture
def said(capsys):
    def check(*args, **kwargs):
        assert labkit.check("epoch", *args, **kwargs) is None
        return capsys.readouterr().out.removeprefix("epoch: ").removesuffix("\n")

    return check


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (2.6, "right: 2.6 s."),
        (2.5, "right: within 4% of 2.6 s."),
        ("2.5", "right: within 4% of 2.6 s."),
        ("2.5 s", "right: within 4% of 2.6 s."),
        (np.float32(2.5), "right: within 4% of 2.6 s."),
        (2.0, "near: 2, and it is 2.6 s. Add the two."),
        (0.1, "not yet: 0.1 is 0.038 of it. Add the two."),
        (26, "not yet: 26 is 10 times too large. Add the two."),
        (2500, "2500 is a thousand times as much: milliseconds in place of seconds? Add the two."),
        (0, "0 is not it. Add the two."),
        (-1, "cannot be -1: expected a number from 0 up. Add the two."),
        (math.nan, "cannot be nan: expected a number from 0 up. Add the two."),
        ("a lot", "expected a number (s), got 'a lot'. Add the two."),
        ([1, 2], "expected a number (s), got [1, 2]. Add the two."),
        (None, "no answer yet; here it is 2.6 s."),
        (..., "no answer yet; here it is 2.6 s."),
    ],
)
def test_a_number(said, answer, says):
    assert said(answer, 2.6, "s", hint="Add the two.") == says


def test_a_count_is_told_whole(said):
    assert said(None, 3840) == "no answer yet; here it is 3840."
    assert said(3839, np.int64(3840)) == "right: within 1% of 3840."


def test_a_share_in_percent_and_the_other_way_round(said):
    assert said(4.5, 0.044) == (
        "4.5 is a hundred times as much: percent in place of a share from 0 to 1?"
    )
    assert said(0.045, 4.4, "%") == "0.045 is a hundredth of it: a share in place of percent?"


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (["fixed", "one thread"], "right."),
        ({"One thread ", "FIXED"}, "right."),
        (["fixed"], "1 right, 0 that should not be there, 1 missing. Who delivers?"),
        ("fixed", "1 right, 0 that should not be there, 1 missing. Who delivers?"),
        (["seed", "any"], "0 right, 2 that should not be there, 2 missing. Who delivers?"),
        (7, "0 right, 1 that should not be there, 2 missing. Who delivers?"),
        (None, "no answer yet; here it is one thread, fixed."),
    ],
)
def test_several_words(said, answer, says):
    assert said(answer, ["one thread", "fixed"], hint="Who delivers?") == says


def test_one_word(said):
    assert said("Hang", "hang") == "right."
    assert said("stop", "hang", hint="Who would tell the loop?") == (
        "not that. Who would tell the loop?"
    )
    assert said(None, "hang") == "no answer yet; here it is hang."


class Absurd:
    def __str__(self):
        raise RuntimeError("no words")

    __repr__ = __str__


def test_nothing_that_is_answered_stops_the_notebook(said):
    assert said(Absurd(), 2.6) == "cannot be compared (RuntimeError: no words)."
    assert said(2.6, object()).startswith("cannot be compared (TypeError: ")
