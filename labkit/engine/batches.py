"""What a batch looks like, whether this one fits, and whose memory it lies in."""

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from labkit.engine.memory import aligned_copy, aligned_joined, lies_well

Arrays = list[np.ndarray]
_LARGE_SAMPLE = 1 << 18


class BatchError(ValueError):
    """A batch that does not fit the spec; the message names what came and what was expected."""


@dataclass(frozen=True)
class Component:
    """One array of a batch, without its batch axis: name, shape per sample, dtype (native)."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        if not all(isinstance(size, (int, np.integer)) and size >= 0 for size in self.shape):
            raise ValueError(
                f"Component: shape must be integers >= 0, of one sample, got {self.shape}. Leave "
                "the batch axis away; samples of different sizes must be padded to one."
            )
        object.__setattr__(self, "dtype", np.dtype(self.dtype).newbyteorder("="))

    @property
    def is_text(self) -> bool:
        return self.dtype.kind in "SUO"

    @property
    def nbytes(self) -> int:
        """Bytes per sample."""
        return self.dtype.itemsize * int(np.prod(self.shape))


@dataclass(frozen=True)
class Spec:
    """The structure of a batch (nested tuples and dicts) with a `Component` at each leaf."""

    structure: Any

    @classmethod
    def of(cls, batch: Any) -> "Spec":
        """Reads the spec off a batch. Raises BatchError if it is no batch at all."""

        def describe(name: str, leaf: Any) -> Component:
            array = _as_array(name, leaf)
            if array.ndim == 0:
                raise BatchError(
                    f"delivered {name} = {short(leaf)}, expected an array whose first axis is the "
                    "batch. Yield tuples or dicts of arrays, such as (images, labels)."
                )
            return Component(name, array.shape[1:], array.dtype)

        spec = cls(_walk(batch, describe))
        if not spec.components:
            raise BatchError(
                f"delivered {short(batch)}, expected at least one array. Yield tuples or dicts of "
                "arrays, such as (images, labels)."
            )
        return spec

    @classmethod
    def given(cls, structure: Any) -> "Spec":
        """A spec as a user writes it. Raises TypeError where a leaf is no `Component`."""
        spec = structure if isinstance(structure, Spec) else cls(structure)
        for component in spec.components:
            if not isinstance(component, Component):
                raise TypeError(
                    "QueueRunner: spec must be a tuple or dict with a labkit.Component(name, "
                    f"shape, dtype) at each leaf, got {component!r}."
                )
        return spec

    @property
    def components(self) -> list[Component]:
        found: list[Component] = []
        _walk(self.structure, lambda _, leaf: found.append(leaf))
        return found

    @property
    def bytes_per_sample(self) -> int:
        return sum(component.nbytes for component in self.components)

    @property
    def large(self) -> bool:
        """Whether samples are so large that copying them is what costs."""
        return self.bytes_per_sample >= _LARGE_SAMPLE

    def flatten(self, batch: Any) -> Arrays:
        """The batch's arrays in order. Raises BatchError where they do not fit this spec."""
        return [array for array, _ in self._pairs(batch)]

    def take(self, batch: Any, alone: bool, aligned: int = 0) -> Arrays:
        """The same, in memory that nobody else will write into: copied where somebody could.

        Args:
            alone: nothing but the caller's own variable refers to `batch`.
            aligned: of a batch of so many samples, what TensorFlow would copy is copied here.
        """
        mine = _unshared(batch) if alone else set()
        return [
            aligned_copy(array)
            if _is_others(array, leaf, mine) or (len(array) == aligned and not lies_well(array))
            else array
            for array, leaf in self._pairs(batch)
        ]

    def _pairs(self, batch: Any) -> list[tuple[np.ndarray, Any]]:
        """Each component's array, and the leaf of the batch that it was made from."""
        pairs: list[tuple[np.ndarray, Any]] = []
        _pair_up(self.structure, batch, "", pairs)
        names = (component.name for component in self.components)
        sizes = {name: len(array) for name, (array, _) in zip(names, pairs, strict=True)}
        if len(set(sizes.values())) > 1:
            raise BatchError(
                f"delivered arrays of different length, {sizes}, expected one length for all. "
                "The first axis counts the samples of the batch."
            )
        return pairs

    def pack(self, parts: Iterable[Any]) -> Any:
        """Puts one thing per component back into the batch's structure."""
        rest = iter(parts)
        return _walk(self.structure, lambda _, __: next(rest))


def _walk(node: Any, visit: Callable[[str, Any], Any], name: str = "") -> Any:
    if isinstance(node, dict):
        if len({isinstance(key, str) for key in node}) > 1:
            raise BatchError(
                f"delivered a dict with the keys {list(node)}, expected keys of one type. Name all "
                "of them by texts."
            )
        return {key: _walk(part, visit, _join(name, key)) for key, part in node.items()}
    if isinstance(node, tuple):
        parts = (_walk(part, visit, _join(name, i)) for i, part in enumerate(node))
        return type(node)(*parts) if hasattr(node, "_fields") else tuple(parts)
    return visit(name or "0", node)


def _pair_up(want: Any, got: Any, name: str, pairs: list[tuple[np.ndarray, Any]]) -> None:
    """Appends what `Spec._pairs` gives. No closure: one that calls itself is a cycle, in which the
    arrays would outlive their batch by dozens of others."""
    if isinstance(want, dict):
        if not isinstance(got, dict) or set(got) != set(want):
            keys = isinstance(got, dict) and f"the keys {sorted(map(str, got))}"
            raise BatchError(
                f"delivered {keys or short(got)}, expected a dict with the keys "
                f"{sorted(map(str, want))} as in the first batch. "
                "Yield the same keys every time."
            )
        for key, part in want.items():
            _pair_up(part, got[key], _join(name, key), pairs)
    elif isinstance(want, tuple):
        if not isinstance(got, tuple) or len(got) != len(want):
            length = isinstance(got, tuple) and f"a tuple of {len(got)}"
            raise BatchError(
                f"delivered {length or short(got)}, expected a tuple of {len(want)} as in "
                "the first batch. Yield the same structure every time."
            )
        for index, part in enumerate(want):
            _pair_up(part, got[index], _join(name, index), pairs)
    else:
        pairs.append((_check(want, got), got))


def _join(name: str, key: object) -> str:
    return f"{name}.{key}" if name else str(key)


def short(value: object) -> str:
    """A value's type and the beginning of its repr, for messages."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) < 60 else text[:57] + '...'}"


def _as_array(name: str, leaf: Any) -> np.ndarray:
    """A leaf as TensorFlow may take it by its bytes: native, and text as it was written."""
    if isinstance(leaf, list) and _holds_arrays(leaf):
        raise BatchError(
            f"delivered {name} = a list of {len(leaf)} arrays, expected an array or a tuple of "
            "arrays: a list would be taken for the samples of one array. Yield a tuple, (x, y); "
            "or np.stack(samples) for an array of samples."
        )
    if hasattr(leaf, "toarray"):
        raise BatchError(
            f"delivered {name} = a sparse {type(leaf).__name__}, expected a dense array. Yield it "
            "as .toarray()."
        )
    if np.ma.is_masked(leaf):
        raise BatchError(
            f"delivered {name} = a masked array with {np.ma.count_masked(leaf)} masked values, "
            "which would train as if they were data. Yield it as .filled(value), and the mask as "
            "an array of its own if it is needed."
        )
    try:
        array = np.asarray(leaf)
    except ValueError as error:  # of lists that have no common shape
        raise BatchError(
            f"delivered {name} = {short(leaf)}, expected an array of one shape ({error}). Pad its "
            "rows to one length."
        ) from error
    if array.dtype.kind == "T" or (array.dtype.kind in "SU" and not isinstance(leaf, np.ndarray)):
        # NumPy's older text types drop the zeros at the end of each string.
        return np.array(leaf, object)
    _check_elements(name, array)
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _check_elements(name: str, array: np.ndarray) -> None:
    """Raises BatchError for elements that no tensor can hold, with what to do about them."""
    dtype, cure, found = array.dtype, "", ""  # a dtype's name takes as long to make as all the rest
    if dtype.kind == "O" and array.ndim:
        odd = next((x for x in array.flat if not isinstance(x, (str, bytes))), "")
        found = f"object, with elements of type {type(odd).__name__}"
        if isinstance(odd, (np.ndarray, list, tuple)):
            cure = "Pad them to one shape and np.stack them."
        elif odd is None:
            cure = "Fill in a number or a text for None."
        elif not isinstance(odd, (str, bytes)):
            cure = "Convert them: .astype('float32'), .astype('int64') or .astype(str)."
    elif dtype.kind in "Mm":
        cure = "Convert them to numbers: .astype('int64')."
    elif dtype.kind in "fc" and dtype.itemsize > 8 * (1 + (dtype.kind == "c")):
        cure = f"Convert it: .astype('{'complex128' if dtype.kind == 'c' else 'float64'}')."
    elif dtype.fields is not None:
        cure = f"Yield its fields as a dict of arrays: {', '.join(dtype.fields)}."
    if cure:
        raise BatchError(
            f"delivered component '{name}' of {found or dtype}, expected numbers, bool or text. "
            f"{cure}"
        )


def _holds_arrays(items: list[Any]) -> bool:
    return any(
        getattr(item, "ndim", 0) or (isinstance(item, list) and _holds_arrays(item))
        for item in items
    )


def _check(want: Component, got: Any) -> np.ndarray:
    array = _as_array(want.name, got)
    same_type = array.dtype == want.dtype or (want.is_text and array.dtype.kind in "SUO")
    if array.shape[1:] == want.shape and array.ndim > 0 and same_type:
        return array
    shape = "(" + ", ".join(["n", *map(str, want.shape)]) + ("," if not want.shape else "") + ")"
    if not same_type:
        raise BatchError(
            f"delivered component '{want.name}' with dtype {array.dtype}, expected {want.dtype} as "
            f"in the first batch or the given spec. Convert it with .astype('{want.dtype}')."
        )
    if array.ndim == len(want.shape) and want.shape[-1:] == (1,):
        cure = "Add the channel axis in your generator."
    else:
        cure = "Yield the same shape per sample every time, or pad to it."
    raise BatchError(
        f"delivered component '{want.name}' with shape {array.shape}, expected {shape} as in the "
        f"first batch or the given spec. {cure}"
    )


def joined(parts: Sequence[list[Any]]) -> list[Any]:
    """The samples of several parts, component by component; of one part as they lie."""
    if len(parts) == 1:
        return parts[0]
    return [aligned_joined(pieces) for pieces in zip(*parts, strict=True)]


# ---------------------------------------------------------------- whose memory it is


def _references_of_a_local() -> int:
    thing = object()
    return sys.getrefcount(thing)


# Counted, not written down: newer interpreters leave some references out.
ALONE = _references_of_a_local()


def _unshared(batch: Any) -> set[int]:
    """The `id` of each array in an unshared batch to which, base included, nobody else refers.

    Owning its memory proves nothing of an array: `x[0] = k; yield (x,)` owns it, and writes there
    again.
    """
    if not isinstance(batch, dict | tuple):
        return {id(batch)} if _is_all_of_it(batch) else set()
    found: set[int] = set()
    for part in batch.values() if isinstance(batch, dict) else batch:
        if sys.getrefcount(part) > ALONE + 1:  # the container's, and that of `part`
            continue
        if isinstance(part, dict | tuple):
            found |= _unshared(part)
        elif _is_all_of_it(part):
            found.add(id(part))
    return found


def _is_all_of_it(array: Any) -> bool:
    if type(array) is not np.ndarray:
        return False
    base = array.base
    while type(base) is np.ndarray and sys.getrefcount(base) <= ALONE + 1:
        array, base = base, base.base
    return base is None and array.flags.owndata


def _is_others(array: np.ndarray, leaf: Any, mine: set[int]) -> bool:
    """Whether somebody else could still write into `array`, made from `leaf`."""
    if isinstance(leaf, list) or id(leaf) in mine:
        return False
    return not isinstance(leaf, np.ndarray) or np.may_share_memory(array, leaf)
