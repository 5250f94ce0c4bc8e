"""Headers are read without pixels, bounded, and with every oddity named."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.dicom_ingest.headers import InstanceHeader, NotAnInstance, read_header
from services.dicom_ingest.settings import IngestSettings
from tests.fixtures.dicom_files import ct_dataset, enhanced_ct, write_dicom

SETTINGS = IngestSettings()


def test_what_intake_needs_is_read(tmp_path: Path) -> None:
    header = read_header(write_dicom(tmp_path / "x", ct_dataset()), SETTINGS)

    assert isinstance(header, InstanceHeader)
    assert header.faults == ()
    assert (header.shared.rows, header.shared.columns) == (16, 12)
    assert header.frames[0].position_xyz == (-100.0, -80.0, 30.0)
    assert header.frames[0].pixel_spacing == (0.8, 0.7)
    assert header.frames[0].convolution_kernel == "B60f"
    assert header.shared.identity.patient_id == "P1"


def test_frames_of_an_enhanced_object_have_their_own_places(tmp_path: Path) -> None:
    header = read_header(write_dicom(tmp_path / "x", enhanced_ct(4)), SETTINGS)

    assert isinstance(header, InstanceHeader)
    assert [frame.position_xyz for frame in header.frames] == [(-100, -80, 30 + 1.5 * n) for n in range(4)]
    assert {frame.rescale_intercept for frame in header.frames} == {-1024.0}


def test_equal_values_are_kept_once(tmp_path: Path) -> None:
    known: dict[object, object] = {}
    first = read_header(write_dicom(tmp_path / "a", ct_dataset(0)), SETTINGS, keep=lambda v: known.setdefault(v, v))
    second = read_header(write_dicom(tmp_path / "b", ct_dataset(1)), SETTINGS, keep=lambda v: known.setdefault(v, v))

    assert isinstance(first, InstanceHeader)
    assert isinstance(second, InstanceHeader)
    assert first.shared is second.shared


def faults_of(path: Path) -> tuple[str, ...]:
    try:
        return read_header(path, SETTINGS).faults
    except NotAnInstance as error:
        return (error.reason,)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 1400), st.binary(min_size=1, max_size=12), st.booleans())
def test_no_damage_to_a_file_is_an_error_of_ours(tmp_path: Path, at: int, noise: bytes, cut: bool) -> None:
    path = write_dicom(tmp_path / "x", ct_dataset())
    content = bytearray(path.read_bytes())
    content[at : at + len(noise)] = noise
    path.write_bytes(bytes(content[: at + len(noise)] if cut else content))

    texts = faults_of(path)

    assert all(texts)
    assert not any("Doe" in text for text in texts)


@pytest.mark.parametrize("content", [b"\x08\x00", b"\x08\x00\x05\x00CS\x0a\x00ISO_IR 100", bytes(132)])
def test_stubs_are_no_images(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(content)

    with pytest.raises(NotAnInstance):
        read_header(path, SETTINGS)
