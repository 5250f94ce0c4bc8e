"""Chooses series by what they are, never by what they are called, and says for each one left out why.

Pure functions over headers. A series is eligible when it is CT, a primary stack of axial slices that assembles. Of
several eligible reconstructions of one scan (same frame of reference, same extent) the one is taken that shows bone
best; a series that a mask references always wins.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from services.dicom_ingest.assembly import Arrangement, slice_normal
from services.dicom_ingest.headers import (
    CT_CLASSES,
    ENHANCED_CT_CLASSES,
    SECONDARY_CAPTURE_PREFIX,
    InstanceHeader,
    class_name,
)
from services.dicom_ingest.settings import IngestSettings

_LOCALIZERS: Final = ("LOCALIZER", "SCOUT", "TOPOGRAM", "SURVIEW", "REF_SURVIEW")
_DERIVED_KINDS: Final = (
    "MIP",
    "MAXIMUM",
    "MINIP",
    "MINIMUM",
    "PERFUSION",
    "RCBF",
    "RCBV",
    "MTT",
    "TTP",
    "CALCIUM",
    "IODINE",
)

_BONE_WORDS: Final = (
    "BONE",
    "SHARP",
    "EDGE",
    "DETAIL",
    "LUNG",
    "HRES",
    "ULTRA",
    "YA",
    "YB",
    "YC",
    "YD",
    "FC30",
    "FC81",
)
_SOFT_WORDS: Final = ("STANDARD", "STD", "SOFT", "SMOOTH", "BRAIN")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """What the choice within a study needs of one eligible series."""

    key: str
    series_instance_uid: str
    frame_of_reference_uid: str
    sharpness: float
    slice_spacing_mm: float
    extent_mm: tuple[float, float]
    """First and last position along the normal."""
    slices: int


def refusals(instances: Sequence[InstanceHeader], settings: IngestSettings) -> tuple[str, ...]:
    """Why a series is not what is looked for, by modality, class, kind of image and orientation; () where it is."""
    reasons: list[str] = []
    modalities = sorted({i.shared.modality for i in instances})
    if modalities != ["CT"]:
        named = " and ".join(_modality(m) for m in modalities)
        reasons.append(f"modality {named}, not CT")
    classes = sorted({i.sop_class_uid for i in instances})
    if any(uid.startswith(SECONDARY_CAPTURE_PREFIX) for uid in classes):
        reasons.append("secondary capture, not an image of the scanner")
    elif not set(classes) <= CT_CLASSES | ENHANCED_CT_CLASSES:
        reasons.append(f"{' and '.join(class_name(uid) for uid in classes)}, not CT Image Storage")
    kinds = {part for i in instances for frame in i.frames for part in frame.image_type}
    if kinds & set(_LOCALIZERS):
        all_of_it = all(set(frame.image_type) & set(_LOCALIZERS) for i in instances for frame in i.frames)
        reasons.append("localiser" if all_of_it else "localiser images among the slices")
    derived = sorted(kinds & set(_DERIVED_KINDS))
    if derived:
        reasons.append(f"derived images ({derived[0]}), not attenuation of the scan")
    if any(i.shared.samples_per_pixel != 1 for i in instances):
        reasons.append("colour images")
    slope = _axial_angle(instances)
    if slope is not None and slope > settings.max_axial_tilt_degrees:
        reasons.append(f"not an axial stack: the slice normal is {slope:.0f} degrees from the head-foot axis")
    return tuple(reasons)


def _modality(value: str) -> str:
    return value if re.fullmatch(r"[A-Z]{2,10}", value) else "not given" if not value else "unknown"


def _axial_angle(instances: Sequence[InstanceHeader]) -> float | None:
    plane = next((f for i in instances for f in i.frames if f.orientation_xyz is not None), None)
    if plane is None or plane.orientation_xyz is None:
        return None
    cosines = np.asarray(plane.orientation_xyz, dtype=np.float64)
    if min(float(np.linalg.norm(cosines[:3])), float(np.linalg.norm(np.cross(cosines[:3], cosines[3:])))) < 1e-6:
        return None
    normal = slice_normal(plane)
    return float(np.degrees(np.arccos(min(1.0, abs(float(normal[2])) / float(np.linalg.norm(normal))))))


def kernel_sharpness(convolution_kernel: str) -> float:
    """A rank of how sharp a reconstruction kernel is (0 soft … 100 sharp); 40 where its name says nothing.

    Siemens names carry a number (B70f, Br59, Bl64), so do Canon's (FC03 soft, FC30 bone) and Philips' letters (A
    smooth … E sharp); GE writes words.
    """
    name = convolution_kernel.strip().upper()
    siemens = re.match(r"^[BHUIQTDJ][A-Z]?(\d{2})", name)
    if siemens:
        return float(siemens.group(1))
    canon = re.match(r"^FC(\d{2})", name)
    if canon:
        number = int(canon.group(1))
        return 70.0 if 30 <= number <= 39 or 50 <= number <= 59 or number >= 80 else 35.0
    if any(word in name for word in _BONE_WORDS[:7]) or name in _BONE_WORDS:
        return 65.0 if "LUNG" in name else 75.0
    if any(word in name for word in _SOFT_WORDS):
        return 30.0
    if re.fullmatch(r"[A-E]", name):
        return {"A": 20.0, "B": 30.0, "C": 40.0, "D": 60.0, "E": 70.0}[name]
    return 40.0


def candidate_of(key: str, instances: Sequence[InstanceHeader], arrangement: Arrangement) -> Candidate | None:
    """The facts of an eligible series; None where its arrangement has reasons."""
    if arrangement.geometry is None:
        return None
    kernel = next((f.convolution_kernel for i in instances for f in i.frames if f.convolution_kernel), "")
    shared = instances[0].shared
    return Candidate(
        key=key,
        series_instance_uid=shared.series_instance_uid,
        frame_of_reference_uid=shared.frame_of_reference_uid,
        sharpness=kernel_sharpness(kernel),
        slice_spacing_mm=arrangement.geometry.spacing_zyx[0],
        extent_mm=(arrangement.frames[0].position_mm, arrangement.frames[-1].position_mm),
        slices=len(arrangement.frames),
    )


def _same_scan(one: Candidate, other: Candidate) -> bool:
    """Two reconstructions of one scan: same frame of reference, and the smaller extent lies mostly in the other."""
    if not one.frame_of_reference_uid or one.frame_of_reference_uid != other.frame_of_reference_uid:
        return False
    overlap = min(one.extent_mm[1], other.extent_mm[1]) - max(one.extent_mm[0], other.extent_mm[0])
    shorter = min(c.extent_mm[1] - c.extent_mm[0] for c in (one, other))
    return overlap >= 0.8 * shorter


def left_out(
    candidates: Sequence[Candidate],
    settings: IngestSettings,
    *,
    referenced_series_uids: frozenset[str] = frozenset(),
) -> Mapping[str, str]:
    """Which eligible series of a study are left out (by their key), and why.

    Order of preference: referenced by a mask; fine enough to be scored; longer where the other covers much less; the
    sharper kernel; thinner slices.
    """

    def rank(c: Candidate) -> tuple[float, ...]:
        fine = c.slice_spacing_mm <= settings.max_scored_spacing_mm + 1e-3
        return (float(fine), c.sharpness, -round(c.slice_spacing_mm, 2), c.extent_mm[1] - c.extent_mm[0], c.slices)

    kept: list[Candidate] = []
    out: dict[str, str] = {}
    referenced = [c for c in candidates if c.series_instance_uid and c.series_instance_uid in referenced_series_uids]
    kept.extend(referenced)
    others = sorted((c for c in candidates if c not in referenced), key=lambda c: (*(-r for r in rank(c)), c.key))
    for candidate in others:
        better = next((k for k in kept if _same_scan(k, candidate) and not _reaches_further(candidate, k)), None)
        if better is None:
            kept.append(candidate)
        else:
            out[candidate.key] = _why(candidate, better, referenced=better in referenced, settings=settings)
    return out


def _reaches_further(one: Candidate, other: Candidate) -> bool:
    """Whether a series shows much that the other one does not."""
    return (one.extent_mm[1] - one.extent_mm[0]) > 1.25 * (other.extent_mm[1] - other.extent_mm[0])


def _why(candidate: Candidate, better: Candidate, *, referenced: bool, settings: IngestSettings) -> str:
    if referenced:
        return "left out: a mask references another series of the same scan"
    limit = settings.max_scored_spacing_mm + 1e-3
    if candidate.slice_spacing_mm > limit >= better.slice_spacing_mm:
        return f"left out: another series of the same scan has slices of {better.slice_spacing_mm:.1f} mm"
    if better.sharpness > candidate.sharpness:
        return "left out: the sharper kernel of the same scan was chosen"
    if round(better.slice_spacing_mm, 2) < round(candidate.slice_spacing_mm, 2):
        return "left out: the thinner slices of the same scan were chosen"
    return "left out: an equal series of the same scan was chosen"
