"""Checks of arguments, and one form for what they say: what was expected, and what came."""

import math
import tempfile
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any


def is_integer(value: Any, least: float = -math.inf, most: float = math.inf) -> bool:
    """A whole number in the range, NumPy's included; True and False are none."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    return whole and least <= value <= most


def is_number(value: Any, least: float = 0.0) -> bool:
    """A finite number from `least` on; True and False are none."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    return number and least <= value < math.inf


def is_folder_to_write(path: str | Path) -> bool:
    """Makes the folder if need be, and tries: permissions alone do not tell. Addresses of remote
    storage, as `gs://…`, pass untried."""
    if "://" in str(path):
        return True
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError:
        return False
    return True


def expect(condition: bool, what: str, got: Any) -> None:
    """Raises ValueError, `what` was expected and what came, unless the condition holds."""
    if not condition:
        raise ValueError(f"{what}, got {got!r}.")


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What of `now` was something else before, name by name."""
    return [
        f"{name} was {was.get(name)!r}, and is {value!r}"
        for name, value in now.items()
        if was.get(name) != value
    ]
