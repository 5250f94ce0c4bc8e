"""Stored values become HU."""

from __future__ import annotations

import numpy as np
import pytest

from services.dicom_ingest.headers import PlaneHeader
from services.dicom_ingest.pixels import can_decode, to_hu


def plane(slope: float, intercept: float) -> PlaneHeader:
    return PlaneHeader(rescale_slope=slope, rescale_intercept=intercept)


def test_slope_and_intercept_are_applied_and_rounded() -> None:
    values = np.array([[0, 1, 3]], np.uint16)

    hu = to_hu(values, plane(0.5, -10.2), padding=None, padding_limit=None)

    assert hu.dtype == np.int16
    assert hu.tolist() == [[-10, -10, -9]]


def test_values_beyond_sixteen_bits_are_clipped() -> None:
    values = np.array([[0, 65535]], np.uint16)

    hu = to_hu(values, plane(1, -40000), padding=None, padding_limit=None)

    assert hu.tolist() == [[-32768, 25535]]


def test_padding_becomes_air() -> None:
    values = np.array([[-2000, 0, 24]], np.int16)

    hu = to_hu(values, plane(1, -1024), padding=-2000, padding_limit=None)

    assert hu.tolist() == [[-1024, -1024, -1000]]


def test_a_range_of_padding_becomes_air() -> None:
    values = np.array([[10, 11, 12, 13]], np.int16)

    hu = to_hu(values, plane(1, 0), padding=12, padding_limit=11)

    assert hu.tolist() == [[10, -1024, -1024, 13]]


def test_signed_padding_of_unsigned_pixels_is_read_as_the_same_bits() -> None:
    values = np.array([[63536, 5]], np.uint16)

    hu = to_hu(values, plane(1, 0), padding=-2000, padding_limit=None)

    assert hu.tolist() == [[-1024, 5]]


@pytest.mark.parametrize(
    ("syntax", "decodable"),
    [
        ("1.2.840.10008.1.2", True),
        ("1.2.840.10008.1.2.5", True),
        ("1.2.840.10008.1.2.4.70", True),
        ("1.2.840.10008.1.2.4.80", True),
        ("1.2.840.10008.1.2.4.90", True),
        ("1.2.840.10008.1.2.4.53", False),
        ("1.2.840.10008.1.2.8.1", False),
        ("1.2.840.10008.1.2.4.100", False),
        ("nonsense", False),
    ],
)
def test_each_transfer_syntax_has_one_decoder_or_none(syntax: str, decodable: bool) -> None:
    assert can_decode(syntax) is decodable
