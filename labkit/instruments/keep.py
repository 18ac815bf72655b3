"""A report as a file: JSON that is read back as it was, and a page that opens anywhere."""

import contextlib
import html
import json
import math
import os
import shutil
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

FORMAT = 1
LIVE = {"iterator", "model", "repeated", "saved"}  # fields of a report that no file can hold
_STYLE = (
    "body{font-family:sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse}td,th{padding:.2em .8em;text-align:left}"
)


@dataclass(frozen=True)
class About:
    """What a report tells beside its numbers.

    Attributes:
        labkit: its version.
        machine: processor, cores and versions, as `labkit.machine.describe_machine` has them.
        onednn: the note that it is off; "" where there is none.
        unsplit: what would let the data be split among workers; "" where they are.
        taken: steps that were really taken, and that nothing puts back; None where that is done.
    """

    labkit: str
    machine: dict[str, Any]
    onednn: str
    unsplit: str
    taken: int | None


def as_json(report: Any) -> str:
    """Strict JSON. `verdict` and `waiting` are for readers of the file: they follow from the rest,
    as they do in a report."""
    numbers = {f.name: getattr(report, f.name) for f in fields(report) if f.name not in LIVE}
    said = {"verdict": report.verdict, "waiting": report.waiting}
    data = {"format": FORMAT, **said, "about": report.about, "report": numbers}
    return json.dumps(_plain(data), indent=1, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """In what JSON has; a number that is not finite as its name, "inf", "-inf" or "nan"."""
    if is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    value = value.item() if hasattr(value, "item") else value
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def members(kind: Any, value: Any, where: str) -> dict[str, Any]:
    """The arguments of a dataclass, without those that are live, out of what `_plain` made of it.
    What is None where it is unknown may be missing: an older labkit did not measure it. Raises
    ValueError, which names the place, for anything else."""
    types = {f.name: f.type for f in fields(kind) if f.name not in LIVE}
    unknown = {f.name: None for f in fields(kind) if f.name in types and f.default is None}
    found = {**unknown, **_as(dict, value, where)}
    if found.keys() != types.keys():
        raise ValueError(f"{where} must have {', '.join(types)}, and has {', '.join(found)}")
    return {name: typed(of, found[name], f"{where}.{name}") for name, of in types.items()}


def typed(kind: Any, value: Any, where: str) -> Any:
    """What `_plain` made a plain value of: `kind` is a dataclass or a type as its fields have."""
    if is_dataclass(kind):
        return kind(**members(kind, value, where))  # type: ignore[operator]
    outer, inner = get_origin(kind), get_args(kind)
    if outer is list:
        return [typed(inner[0], v, f"{where}[{i}]") for i, v in enumerate(_as(list, value, where))]
    if outer is dict:
        pairs = _as(dict, value, where).items()
        return {key: typed(inner[1], part, f"{where}.{key}") for key, part in pairs}
    if outer is UnionType:  # with None
        return None if value is None else typed(inner[0], value, where)
    if kind is float:
        return float(value) if value in ("inf", "-inf", "nan") else _as((int, float), value, where)
    return value if kind is Any else _as(kind, value, where)


def _as(kind: Any, value: Any, where: str) -> Any:
    if isinstance(value, kind) and not isinstance(value, bool):
        return value
    names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
    raise ValueError(f"{where} must be of type {names}, and is {value!r:.60}")


def page(report: Any) -> str:
    """The report as one HTML page that needs nothing beside it."""
    about = report.about
    made = {"labkit": about.labkit, **about.machine, "cores": f"{about.machine['cores']} usable"}
    if "gpus" in made:
        made["gpus"] = ", ".join(made["gpus"])
    with_what = ", ".join(f"{name} {value}" for name, value in made.items())
    title = f"labkit.diagnose: {report.verdict.split(':')[0]}"
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body>{report._repr_html_()}\n"
        f"<p><small>Measured on {html.escape(f'{report.date}; {with_what}')}.</small></p></body>\n"
        "</html>\n"
    )


def paragraphs(shown: Any) -> str:
    """The lines of anything's text as HTML."""
    return "".join(f"<p>{html.escape(line)}</p>" for line in str(shown).splitlines())


def write(who: str, path: str | Path, content: str | bytes) -> None:
    """Writes the file whole or not at all, with the rights that it had, in a folder that is there.
    Raises OSError."""
    # Names of files may hold what UTF-8 cannot, and end up in a page.
    if isinstance(content, str):
        content = content.encode("utf-8", "xmlcharrefreplace")
    target = Path(path).resolve()  # through links, which stay
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{who}: the folder of {path} does not exist; make it first.")
    if target.exists() and not target.is_file():
        target.write_bytes(content)  # a pipe or a device, which nothing can take the place of
        return
    beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, beside)
        os.replace(beside, target)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise
