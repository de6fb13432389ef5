"""Messages of errors that are for the user."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import metadata
from itertools import pairwise

from tempering.utils.text import printable

# errors whose message is for the user; some by name, because their modules import torch
USER_ERRORS = (ValueError, OSError, ImportError, FloatingPointError)
USER_ERROR_NAMES = (
    "CorruptCacheError",
    "CorruptCheckpointError",
    "CorruptStoreError",
    "SelfCheckError",
    "TeacherMismatchError",
)
EXTRA = re.compile(r"""^([\w.-]+).*extra *== *["']([\w-]+)["']""")  # of a requirement: its package and its extra


def is_user_error(error: Exception) -> bool:
    """Return whether an error's message is for the user, so that no traceback is needed."""
    return isinstance(error, USER_ERRORS) or type(error).__name__ in USER_ERROR_NAMES


def message(error: Exception, argv: Sequence[str] = ()) -> str:
    """Return an error's message; Python's own, of a missing package or file, say what to type, or which flag it was."""
    text = str(error)
    if isinstance(error, ModuleNotFoundError) and error.name and text.startswith(("No module named", "import of")):
        package = error.name.partition(".")[0]
        extra = extra_of(package)
        if extra:
            text = f'{package} is not installed: pip install "tempering[{extra}]"'
    elif isinstance(error, OSError) and text.startswith("[Errno") and error.filename is not None:
        flag = next((a for a, b in pairwise(argv) if b == str(error.filename) and a.startswith("-")), "")
        text = f"{error.strerror}: {error.filename}{f', given as {flag}' if flag else ''}"
    return printable(text or type(error).__name__)


def extra_of(package: str) -> str | None:
    """Return the smallest extra of this library that installs a package; None if no extra does, or for a checkout."""
    try:
        requirements = metadata.requires("tempering") or []
    except metadata.PackageNotFoundError:
        return None
    parts = [found.groups() for line in requirements if (found := EXTRA.match(line))]
    extras = [extra for _, extra in parts]
    with_it = {extra for name, extra in parts if name.replace("-", "_") == package and extra != "dev"}
    return min(with_it, key=lambda extra: (extras.count(extra), extra), default=None)
