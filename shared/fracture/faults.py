"""Faults and reasons in one line, for people."""

from __future__ import annotations

import re
from typing import Final

from pydantic import ValidationError

_NUMBER: Final = re.compile(r"(?<![A-Za-z0-9.])[0-9]+(\.[0-9]+)?")


def group_of(reason: str) -> str:
    """A reason without its numbers, so that equal reasons can be counted."""
    return _NUMBER.sub("…", reason)


def faults_of(error: ValidationError, *, whole: str) -> str:
    """All faults that pydantic found, each with the place where it stands (`whole`: of the file as such).

    Without the values themselves, which may be identifiers.
    """
    return "; ".join(
        f"{'.'.join(map(str, one['loc'])) or whole}: {one['msg']}"
        for one in error.errors(include_url=False, include_context=False, include_input=False)
    )
