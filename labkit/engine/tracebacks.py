"""Errors as the user should read them: their own lines, and none of labkit's."""

import linecache
import re
import threading
import traceback
from pathlib import Path

from labkit.engine.batches import BatchError

_ENGINE = Path(__file__).parent
_OWN = (str(_ENGINE), str(_ENGINE.with_name("sources.py")), str(_ENGINE.with_name("collate.py")))


def describe(error: BaseException) -> tuple[str, str]:
    """One line that names the error, and its traceback without labkit's own frames."""
    if isinstance(error, BatchError):
        return str(error), "".join(getattr(error, "__notes__", ()))
    try:
        summary = f"raised {type(error).__name__}: {error}"
    except Exception as broken:
        summary = f"raised {type(error).__name__}, whose text raises {type(broken).__name__}"
    stack = traceback.TracebackException.from_exception(error)
    stack.stack = own_frames_left_out(stack.stack)
    return summary, "".join(stack.format())


def is_own(filename: str) -> bool:
    """Whether a frame of this file is labkit's business, not the user's."""
    return filename.startswith(_OWN) or filename == threading.__file__


def own_frames_left_out(stack: traceback.StackSummary) -> traceback.StackSummary:
    kept = [frame for frame in stack if not is_own(frame.filename)]
    return traceback.StackSummary.from_list(kept or list(stack))


def readable(text: str) -> str:
    """Adds the source lines of notebook cells, which worker processes lack, and names the cells."""

    def complete(found: re.Match[str]) -> str:
        line = linecache.getline(found[1], int(found[2])).strip()
        return f"{found[0]}    {line}\n" if line else found[0]

    text = re.sub(r'  File "(.+)", line (\d+).*\n(?!    )', complete, text)
    return re.sub(r'File ".*ipykernel_\d+/\d+\.py"', 'File "<notebook cell>"', text)
