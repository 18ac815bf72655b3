"""Samples into batches, and batches of Keras and PyTorch into what the engine takes."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from labkit.engine.batches import BatchError

_AS_IT_IS = (dict, tuple, str, bytes, type(None))


class Loaded:
    """A path's sample by its index."""

    def __init__(self, paths: list[Any], load: Callable[[Any], Any]) -> None:
        self.paths, self.load = paths, load

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        return self.load(self.paths[index])


def plain(node: Any) -> Any:
    """Tensors as arrays; and a list with arrays in it as the tuple that Keras and PyTorch mean."""
    if isinstance(node, dict):
        return {key: plain(part) for key, part in node.items()}
    if isinstance(node, tuple):
        return _like(node, [plain(part) for part in node])
    if isinstance(node, list):
        parts = [plain(part) for part in node]
        nested = any(isinstance(part, (tuple, dict)) or getattr(part, "ndim", 0) for part in parts)
        return tuple(parts) if nested else parts
    return node.numpy() if hasattr(node, "numpy") else node


def stacked(samples: Sequence[Any], names: Sequence[Any], component: str = "") -> Any:
    """Samples of one structure as a batch; `names` tell which they are.

    Raises BatchError where one is None, or has another structure or shape than the first.
    """
    samples = [part if isinstance(part, _AS_IT_IS) else np.asarray(part) for part in samples]
    forms = [_form(sample) for sample in samples]
    first, what = samples[0], f"'{component}' of sample" if component else "sample"
    for name, form in zip(names, forms, strict=True):
        if form == "None":
            raise BatchError(
                f"delivered {what} {name!r} as None, expected an array, a number or a text. Fill "
                "in a value, or leave that sample out."
            )
        if form != forms[0]:
            raise BatchError(
                f"delivered {what} {name!r} as {form}, expected {forms[0]} as of sample "
                f"{names[0]!r}. Give all samples one structure and one shape: pad or resize them."
            )
    at = f"{component}." if component else ""
    if isinstance(first, dict):
        return {key: stacked([s[key] for s in samples], names, f"{at}{key}") for key in first}
    if isinstance(first, tuple):
        columns = enumerate(zip(*samples, strict=True))
        return _like(first, [stacked(column, names, f"{at}{i}") for i, column in columns])
    # NumPy's older text types drop the zeros at the end of each string.
    return np.array(samples, object) if forms[0] == "text" else np.stack(samples)


def _like(node: tuple[Any, ...], parts: Sequence[Any]) -> tuple[Any, ...]:
    return type(node)(*parts) if hasattr(node, "_fields") else tuple(parts)


def _form(sample: Any) -> str:
    if isinstance(sample, dict):
        return f"a dict with the keys {sorted(map(str, sample))}"
    if isinstance(sample, tuple):
        return f"a tuple of {len(sample)}"
    if isinstance(sample, (str, bytes)):
        return "text"
    return "None" if sample is None else f"an array of shape {sample.shape}"
