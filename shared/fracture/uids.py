"""The UIDs of the DICOM objects that we make, so that they are known again when the PACS sends them back.

A UUID-derived arc (PS3.5 B.2, ITU-T X.667) drawn once for this project, with a hash below it: equal content gives equal
UIDs, and no registration authority is needed. Phantoms and tests that play a *foreign* scanner or segmentation tool
must not use this root: masks under it are ignored.
"""

from __future__ import annotations

from typing import Any, Final

from shared.fracture.ids import digest

OUR_UID_ROOT: Final = "2.25.447753288532887100115985634078061138."
"""Every Study-, Series- and SOP Instance UID that we make begins with it."""

OUR_IMPLEMENTATION_CLASS_UID: Final = OUR_UID_ROOT + "1"

OUR_MANUFACTURER: Final = "fracture-sweep"
"""Manufacturer of the objects that we make: survives an archive that assigns new UIDs."""

_DIGITS: Final = 64 - len(OUR_UID_ROOT)


def deterministic_uid(kind: str, *parts: Any) -> str:
    """A UID of ours (at most 64 characters) made from what it names: the same parts give the same UID."""
    number = int(digest([kind, *parts]), 16) % (10**_DIGITS - 2) + 2
    return f"{OUR_UID_ROOT}{number}"


def is_our_uid(uid: str) -> bool:
    """Whether a UID lies under our root."""
    return uid.startswith(OUR_UID_ROOT)
