"""What is wrong with a file that a person wrote, in one line."""

from __future__ import annotations

from pydantic import ValidationError


def faults_of(error: ValidationError, *, whole: str) -> str:
    """All faults that pydantic found, each with the place where it stands (`whole`: of the file as such).

    Without the values themselves, which may be identifiers.
    """
    return "; ".join(
        f"{'.'.join(map(str, one['loc'])) or whole}: {one['msg']}"
        for one in error.errors(include_url=False, include_context=False, include_input=False)
    )
