"""Of several reconstructions of one scan the one is taken that shows bone best, unless a mask says otherwise."""

from __future__ import annotations

import pytest

from services.dicom_ingest.series_selection import Candidate, kernel_sharpness, left_out
from services.dicom_ingest.settings import IngestSettings

SETTINGS = IngestSettings()


def candidate(
    key: str, *, kernel: str = "B30f", spacing: float = 1.0, extent: float = 300.0, of: str = "F"
) -> Candidate:
    return Candidate(
        key=key,
        series_instance_uid=key,
        frame_of_reference_uid=of,
        sharpness=kernel_sharpness(kernel),
        slice_spacing_mm=spacing,
        extent_mm=(0.0, extent),
        slices=int(extent / spacing),
    )


@pytest.mark.parametrize(
    ("sharp", "soft"),
    [
        ("B70f", "B30f"),
        ("Br64f/3", "Br38f/3"),
        ("BONEPLUS", "STANDARD"),
        ("BONE", "SOFT"),
        ("FC30", "FC08"),
        ("FC81", "FC21"),
        ("D", "B"),
        ("LUNG", "STANDARD"),
    ],
)
def test_kernels_of_the_vendors_are_ranked(sharp: str, soft: str) -> None:
    assert kernel_sharpness(sharp) > kernel_sharpness(soft)


def test_the_sharper_kernel_of_the_same_scan_is_taken() -> None:
    out = left_out([candidate("soft"), candidate("bone", kernel="B70f")], SETTINGS)

    assert out == {"soft": "left out: the sharper kernel of the same scan was chosen"}


def test_the_thinner_slices_are_taken_where_kernels_are_equal() -> None:
    out = left_out([candidate("thick", spacing=2.0), candidate("thin", spacing=1.0)], SETTINGS)

    assert out == {"thick": "left out: the thinner slices of the same scan were chosen"}


def test_slices_too_thick_to_score_do_not_win_by_their_kernel() -> None:
    out = left_out([candidate("bone", kernel="B70f", spacing=5.0), candidate("soft", spacing=1.0)], SETTINGS)

    assert out == {"bone": "left out: another series of the same scan has slices of 1.0 mm"}


def test_a_series_that_a_mask_references_always_wins() -> None:
    series = [candidate("soft"), candidate("bone", kernel="B70f")]

    out = left_out(series, SETTINGS, referenced_series_uids=frozenset({"soft"}))

    assert out == {"bone": "left out: a mask references another series of the same scan"}


def test_two_referenced_series_both_stay() -> None:
    series = [candidate("soft"), candidate("bone", kernel="B70f")]

    assert left_out(series, SETTINGS, referenced_series_uids=frozenset({"soft", "bone"})) == {}


def test_another_frame_of_reference_or_another_part_of_the_body_stays() -> None:
    chest, other = candidate("chest"), candidate("other", of="G", kernel="B70f")
    abdomen = Candidate(
        key="abdomen",
        series_instance_uid="abdomen",
        frame_of_reference_uid="F",
        sharpness=70,
        slice_spacing_mm=1.0,
        extent_mm=(-400.0, -50.0),
        slices=350,
    )

    assert left_out([chest, other, abdomen], SETTINGS) == {}


def test_a_short_bone_series_does_not_push_out_the_whole_scan() -> None:
    out = left_out([candidate("whole"), candidate("detail", kernel="B70f", extent=60.0)], SETTINGS)

    assert "whole" not in out


def test_the_choice_does_not_hang_on_the_order() -> None:
    series = [candidate("a"), candidate("b"), candidate("c", kernel="B70f", spacing=0.7)]

    assert left_out(series, SETTINGS) == left_out(series[::-1], SETTINGS)
