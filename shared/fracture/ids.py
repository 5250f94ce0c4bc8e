"""Every id and hash of the project: SHA-256 over a canonical form, keyed (HMAC) wherever an identifier goes in.

UIDs, names and record numbers are identifiers. They enter here, under the site's pseudonym key, and nowhere else.
Hashes are kept whole; `short` is for display alone.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Iterable, Mapping
from typing import Any

KEY_BYTES = 32


def canonical_json(value: Any) -> bytes:
    """One byte form for equal JSON values: sorted keys, no blanks, UTF-8, no NaN (ValueError)."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sha256_hex(data: bytes) -> str:
    """The SHA-256 of bytes, 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def digest(value: Any) -> str:
    """The SHA-256 of a JSON value in its canonical form."""
    return sha256_hex(canonical_json(value))


def short(full: str) -> str:
    """The first twelve digits of an id, for people to read. Never a key."""
    return full[:12]


class Pseudonyms:
    """Ids of things whose real names are identifiers, keyed with the site's pseudonym key (32 bytes)."""

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"a pseudonym key has {KEY_BYTES} bytes, this one has {len(key)}")
        self._key = key

    @property
    def fingerprint(self) -> str:
        """What a store keeps of the key, so that it can refuse another one."""
        return self._id("fingerprint", [])

    def _id(self, kind: str, parts: list[str]) -> str:
        return hmac.new(self._key, canonical_json([kind, *parts]), hashlib.sha256).hexdigest()

    def patient_id(self, patient_id: str, issuer: str = "") -> str:
        """The id of a patient: PatientID with IssuerOfPatientID."""
        return self._id("patient", [patient_id, issuer])

    def study_id(self, study_instance_uid: str) -> str:
        """The id of a study."""
        return self._id("study", [study_instance_uid])

    def series_id(self, series_instance_uid: str) -> str:
        """The id of a series."""
        return self._id("series", [series_instance_uid])

    def sweep_id(self, name: str) -> str:
        """The id of a sweep."""
        return self._id("sweep", [name])

    def image_hash(self, sop_instance_uids: Iterable[str]) -> str:
        """The id of a set of instances, whatever their order."""
        return self._id("image", sorted(sop_instance_uids))

    def content_id(self, kind: str, content: bytes) -> str:
        """The id of something that has no UID: its content (NIfTI voxels and geometry, an instance without UID)."""
        return self._id("content-" + kind, [sha256_hex(content)])


def case_id(*, series_id: str, image_hash: str, mask_hash: str, level: str) -> str:
    """The id of one vertebra of one series under one mask."""
    return digest({"series": series_id, "image": image_hash, "mask": mask_hash, "level": level})


def mask_hash(parts: Mapping[str, Any]) -> str:
    """The id of a mask from what defines it: for given masks the voxels' hashes, label map and ROI kind."""
    return digest({"mask": dict(parts)})


def manifest_id(*, image_hash: str | None, mask_hash: str | None, intake: Mapping[str, Any]) -> str:
    """The id of one state of a series: its instances, its masks, and the intake settings that judged them."""
    return digest({"image": image_hash, "mask": mask_hash, "intake": dict(intake)})
