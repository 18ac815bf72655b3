"""Checks of arguments: what counts as a whole number, as a number, and what is said otherwise."""

import math

import numpy as np
import pytest

from labkit.checks import expect, is_integer, is_number


@pytest.mark.parametrize("value", [1, 5, np.int64(3), np.uint8(2), 10**400])
def test_whole_numbers_are_integers_numpys_included(value):
    assert is_integer(value, 1)


@pytest.mark.parametrize("value", [0, True, np.True_, 1.0, np.float64(2), "1", None, [1], math.nan])
def test_everything_else_is_none_of_them(value):
    assert not is_integer(value, 1)


def test_the_range_includes_its_ends():
    assert [n for n in range(8) if is_integer(n, 2, 5)] == [2, 3, 4, 5]


@pytest.mark.parametrize("value", [0, 0.5, 3, np.float32(1.5), np.int64(2)])
def test_a_finite_number_from_zero_on_is_a_number(value):
    assert is_number(value)


@pytest.mark.parametrize("value", [-1e-9, math.nan, math.inf, -math.inf, True, "1", None, 1j])
def test_what_cannot_be_an_amount_is_none(value):
    assert not is_number(value)


def test_what_is_said_names_what_was_expected_and_what_came():
    expect(True, "never said", 1)
    with pytest.raises(ValueError) as error:
        expect(False, "train: epochs must be an integer >= 1", "two")
    assert str(error.value) == "train: epochs must be an integer >= 1, got 'two'."
