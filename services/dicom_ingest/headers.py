"""The few header fields that intake needs, read without the pixels, with every oddity named.

Reading is tolerant (files in archives break the standard in many ways) and bounded: nothing is allocated by what a
header claims before the claim is checked against limits and the file's own length. A fault never quotes a value that
could identify a patient: it names DICOM keywords, numbers of geometry and transfer syntaxes.
"""

from __future__ import annotations

import logging
import math
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal

import pydicom
from pydicom import config
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filereader import read_dataset, read_file_meta_info
from pydicom.tag import Tag
from pydicom.uid import UID

from services.dicom_ingest.collected import PatientIdentity
from services.dicom_ingest.settings import IngestSettings

logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
"""pydicom quotes values of elements in its log lines; those can identify a patient."""

CT_CLASSES: Final = frozenset({"1.2.840.10008.5.1.4.1.1.2"})
ENHANCED_CT_CLASSES: Final = frozenset({"1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2"})
SECONDARY_CAPTURE_PREFIX: Final = "1.2.840.10008.5.1.4.1.1.7"
SEG_CLASSES: Final = frozenset({"1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7"})
RTSTRUCT_CLASS: Final = "1.2.840.10008.5.1.4.1.1.481.3"
DICOMDIR_CLASS: Final = "1.2.840.10008.1.3.10"
DEFLATED: Final = "1.2.840.10008.1.2.1.99"
BIG_ENDIAN: Final = "1.2.840.10008.1.2.2"
IMPLICIT: Final = "1.2.840.10008.1.2"
EXPLICIT: Final = "1.2.840.10008.1.2.1"
UNCOMPRESSED: Final = frozenset({IMPLICIT, EXPLICIT, DEFLATED, BIG_ENDIAN})
LOSSY: Final = frozenset({"1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51"})

_PIXEL_TAGS: Final = frozenset({0x7FE00008, 0x7FE00009, 0x7FE00010})
_LONG_VRS: Final = frozenset({b"OB", b"OW", b"OF", b"OD", b"OL", b"OV", b"UN", b"SQ", b"UT", b"UC", b"UR"})
_PREFIX: Final = 132
_MAX_FRAGMENTS: Final = 1_000_000

_TAGS: Final[tuple[str, ...]] = (
    "AccessionNumber",
    "AcquisitionNumber",
    "BitsAllocated",
    "BitsStored",
    "Columns",
    "ContentDate",
    "ContentTime",
    "ContrastBolusAgent",
    "ContrastBolusAgentSequence",
    "ConvolutionKernel",
    "FrameOfReferenceUID",
    "GantryDetectorTilt",
    "ImageOrientationPatient",
    "ImagePositionPatient",
    "ImageType",
    "ImagesInAcquisition",
    "IssuerOfPatientID",
    "KVP",
    "LossyImageCompression",
    "Manufacturer",
    "Modality",
    "NumberOfFrames",
    "PatientAge",
    "PatientBirthDate",
    "PatientID",
    "PatientName",
    "PatientSex",
    "PerFrameFunctionalGroupsSequence",
    "PhotometricInterpretation",
    "PixelPaddingRangeLimit",
    "PixelPaddingValue",
    "PixelRepresentation",
    "PixelSpacing",
    "ReferencedFrameOfReferenceSequence",
    "ReferencedSeriesSequence",
    "ReferringPhysicianName",
    "RescaleIntercept",
    "RescaleSlope",
    "Rows",
    "SamplesPerPixel",
    "SeriesDate",
    "SeriesInstanceUID",
    "SeriesNumber",
    "SeriesTime",
    "SharedFunctionalGroupsSequence",
    "SliceThickness",
    "SOPClassUID",
    "SOPInstanceUID",
    "SpacingBetweenSlices",
    "SpecificCharacterSet",
    "StructureSetDate",
    "StructureSetTime",
    "StudyDate",
    "StudyDescription",
    "StudyID",
    "StudyInstanceUID",
    "StudyTime",
    "TemporalPositionIdentifier",
    "TimezoneOffsetFromUTC",
)

Vector = tuple[float, float, float]
Cosines = tuple[float, float, float, float, float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class PlaneHeader:
    """Where one frame lies (DICOM's own x, y, z order; mm) and how its stored values become HU. None: not said."""

    position_xyz: Vector | None = None
    orientation_xyz: Cosines | None = None
    """Direction of growing column index, then of growing row index."""
    pixel_spacing: tuple[float, float] | None = None
    """Between rows, between columns."""
    slice_thickness_mm: float | None = None
    rescale_slope: float | None = None
    rescale_intercept: float | None = None
    acquisition: str = ""
    temporal_position: str = ""
    convolution_kernel: str = ""
    kvp: float | None = None
    image_type: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class SeriesHeader:
    """What the instances of one series have in common as a rule; equal ones are kept once."""

    identity: PatientIdentity
    patient_age: str = ""
    study_id: str = ""
    series_instance_uid: str = ""
    series_number: str = ""
    series_date: str = ""
    series_time: str = ""
    frame_of_reference_uid: str = ""
    modality: str = ""
    spacing_between_slices_mm: float | None = None
    contrast_agent: bool | None = None
    manufacturer: str = ""
    gantry_tilt_degrees: float | None = None
    images_in_acquisition: int | None = None
    rows: int | None = None
    columns: int | None = None
    samples_per_pixel: int = 1
    bits_allocated: int | None = None
    bits_stored: int | None = None
    pixel_representation: int | None = None
    photometric_interpretation: str = ""
    pixel_padding_value: int | None = None
    pixel_padding_limit: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class InstanceHeader:
    """One image instance. `faults` are reasons why it cannot be used; they refuse the series that it belongs to."""

    path: Path
    file_bytes: int
    sop_class_uid: str
    sop_instance_uid: str
    """From the dataset, else from the file meta, else ''."""
    transfer_syntax_uid: str
    shared: SeriesHeader
    frames: tuple[PlaneHeader, ...]
    faults: tuple[str, ...] = ()
    lossy: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskObject:
    """One DICOM SEG or RTSTRUCT, as far as its header tells; whoever reads it opens `path`."""

    path: Path
    kind: Literal["dicom-seg", "rtstruct"]
    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    study_instance_uid: str
    series_instance_uid: str
    identity: PatientIdentity
    frame_of_reference_uids: tuple[str, ...]
    """Its own, then the referenced ones."""
    referenced_series_uids: tuple[str, ...]
    referenced_sop_instance_uids: tuple[str, ...]
    written: str
    """Content (or structure set) date and time, for "the newest"."""
    faults: tuple[str, ...] = ()


class NotAnInstance(Exception):
    """A file that belongs to no series. The reason quotes neither path nor value."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@contextmanager
def quiet_pydicom() -> Iterator[None]:
    """Lets pydicom read what breaks the standard, without warnings that quote values."""
    before = config.settings.reading_validation_mode
    config.settings.reading_validation_mode = config.IGNORE
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        config.settings.reading_validation_mode = before


def syntax_name(transfer_syntax_uid: str) -> str:
    """A transfer syntax in words; its UID is public, an unknown one is not quoted."""
    name = UID(transfer_syntax_uid).name
    return f"{name} ({transfer_syntax_uid})" if name != transfer_syntax_uid else "an unknown transfer syntax"


def class_name(sop_class_uid: str) -> str:
    """A SOP class in words."""
    name = UID(sop_class_uid).name
    return name if name and name != sop_class_uid else "unknown SOP class"


class _Fields:
    """Reads elements of one dataset; what is there and makes no sense is collected in `bad` by its keyword."""

    def __init__(self, dataset: Dataset, bad: list[str]) -> None:
        self._dataset = dataset
        self._bad = bad

    def value(self, keyword: str) -> Any:
        try:
            return self._dataset.get(keyword)
        except Exception:  # pydicom raises whatever its converters raise, with values in the text
            self._bad.append(f"{keyword} cannot be read")
            return None

    def text(self, keyword: str) -> str:
        value = self.value(keyword)
        return "" if value is None else str(value).strip(" \0")

    def texts(self, keyword: str) -> tuple[str, ...]:
        value = self.value(keyword)
        if value is None or value == "":
            return ()
        return (value.strip(),) if isinstance(value, str) else tuple(str(item).strip() for item in value)

    def numbers(self, keyword: str, count: int) -> tuple[float, ...] | None:
        value = self.value(keyword)
        if value is None or value == "" or (isinstance(value, Sequence) and len(value) == 0):
            return None
        items = [value] if isinstance(value, (str, int, float)) else list(value)
        try:
            numbers = tuple(float(item) for item in items)
        except (TypeError, ValueError):
            self._bad.append(f"{keyword} is not a number")
            return None
        if len(numbers) != count:
            self._bad.append(f"{keyword} has {len(numbers)} values instead of {count}")
            return None
        if not all(math.isfinite(number) for number in numbers):
            self._bad.append(f"{keyword} is not finite")
            return None
        return numbers

    def number(self, keyword: str) -> float | None:
        numbers = self.numbers(keyword, 1)
        return None if numbers is None else numbers[0]

    def whole(self, keyword: str) -> int | None:
        number = self.number(keyword)
        if number is not None and number != int(number):
            self._bad.append(f"{keyword} is not a whole number")
            return None
        return None if number is None else int(number)

    def items(self, keyword: str) -> Sequence[Dataset]:
        value = self.value(keyword)
        return value if isinstance(value, pydicom.Sequence) else []

    def item(self, keyword: str) -> _Fields:
        items = self.items(keyword)
        return _Fields(items[0] if len(items) else Dataset(), self._bad)


def _inflated(fp: BinaryIO, limit: int) -> BytesIO:
    """The dataset of a deflated file; a bomb stops at the limit."""
    meta_length_at = _PREFIX
    fp.seek(meta_length_at)
    tag = fp.read(12)
    if tag[:8] != b"\x02\x00\x00\x00UL\x04\x00":
        raise NotAnInstance("DICOM file meta information is damaged")
    fp.seek(_PREFIX + 12 + int(struct.unpack("<L", tag[8:12])[0]))
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        data = inflater.decompress(fp.read(), limit)
    except zlib.error as error:
        raise NotAnInstance("deflated data is damaged") from error
    if inflater.unconsumed_tail:
        raise NotAnInstance(f"deflated data grows beyond the limit of {limit} bytes")
    if not inflater.eof:
        raise NotAnInstance("truncated: the deflated data ends early")
    return BytesIO(data)


def _looks_like_dataset(start: bytes) -> bool:
    """Whether a file without the DICM prefix begins with an element of group 0002 or 0008."""
    if len(start) < 8:
        return False
    for order in ("<", ">"):
        group, element = struct.unpack(order + "HH", start[:4])
        if group not in (0x0002, 0x0008) or element > 0x0100:
            continue
        vr, length = start[4:6], int(struct.unpack(order + "L", start[4:8])[0])
        if (vr.isalpha() and vr.isupper()) or length <= 256:
            return True
    return False


def _at_pixels(tag: Any, _vr: str | None, _length: int) -> bool:
    return int(tag) in _PIXEL_TAGS


@dataclass(frozen=True)
class _Pixels:
    """What stands at the pixel data element: declared length (None: encapsulated), bytes that the file really has."""

    declared: int | None
    present: int
    complete: bool


def _pixels_at(fp: BinaryIO, *, size: int, syntax: str) -> _Pixels | None:
    start = fp.tell()
    if size - start < 8:
        return None
    head = fp.read(12)
    order = ">" if syntax == BIG_ENDIAN else "<"
    group, element = struct.unpack(order + "HH", head[:4])
    if (group << 16 | element) not in _PIXEL_TAGS:
        return None
    long_form = head[4:6] in _LONG_VRS
    if long_form and len(head) < 12:
        return None
    if long_form:
        length, data_at = struct.unpack(order + "L", head[8:12])[0], start + 12
    elif head[4:6].isalpha() and head[4:6].isupper() and syntax != IMPLICIT:
        length, data_at = struct.unpack(order + "H", head[6:8])[0], start + 8
    else:
        length, data_at = struct.unpack(order + "L", head[4:8])[0], start + 8
    present = size - data_at
    if length != 0xFFFFFFFF:
        return _Pixels(declared=length, present=min(length, present), complete=length <= present)
    return _Pixels(declared=None, present=present, complete=_fragments_complete(fp, data_at, size))


def _fragments_complete(fp: BinaryIO, at: int, size: int) -> bool:
    """Whether each fragment of encapsulated pixel data ends within the file. A missing delimiter at its end passes."""
    for _ in range(_MAX_FRAGMENTS):
        if at == size:
            return True
        fp.seek(at)
        head = fp.read(8)
        if len(head) < 8:
            return False
        group, element, length = struct.unpack("<HHL", head)
        if (group, element) == (0xFFFE, 0xE0DD):
            return True
        if (group, element) != (0xFFFE, 0xE000):
            return False
        at += 8 + int(length)
        if at > size:
            return False
    return False


def _opened(path: Path, fp: BinaryIO, limit: int) -> tuple[Dataset, FileMetaDataset, str, _Pixels | None]:
    """Dataset up to the pixels, file meta, transfer syntax, pixel element."""
    size = path.stat().st_size
    start = fp.read(_PREFIX + 2048)
    has_prefix = start[128:132] == b"DICM"
    if not has_prefix and not _looks_like_dataset(start):
        raise NotAnInstance("not DICOM")
    if has_prefix and DEFLATED.encode() in start:
        meta = read_file_meta_info(path)
        if meta.get("TransferSyntaxUID") == DEFLATED:
            data = _inflated(fp, limit)
            dataset = read_dataset(
                data, False, True, stop_when=_at_pixels, specific_tags=[Tag(keyword) for keyword in _TAGS]
            )
            return dataset, meta, DEFLATED, _pixels_at(data, size=data.getbuffer().nbytes, syntax=EXPLICIT)
    fp.seek(0)
    read = pydicom.dcmread(fp, stop_before_pixels=True, force=not has_prefix, specific_tags=list(_TAGS))
    meta = read.file_meta
    syntax = str(meta.get("TransferSyntaxUID") or "")
    if not syntax:
        implicit, little = read.original_encoding
        syntax = IMPLICIT if implicit else EXPLICIT if little else BIG_ENDIAN
    return read, meta, syntax, _pixels_at(fp, size=size, syntax=syntax)


def read_header(
    path: Path, settings: IngestSettings, *, keep: Callable[[Any], Any] = lambda value: value
) -> InstanceHeader | MaskObject:
    """The header of one file. NotAnInstance says why a file belongs to no series.

    `keep` maps equal values to one object, so that a hundred thousand headers fit into memory.
    """
    try:
        size = path.stat().st_size
        if size == 0:
            raise NotAnInstance("the file is empty (zero bytes)")
        with quiet_pydicom(), path.open("rb") as fp:
            dataset, meta, syntax, pixels = _opened(path, fp, settings.max_inflated_bytes)
            return _header_of(path, size, dataset, meta, syntax, pixels, settings, keep)
    except NotAnInstance:
        raise
    except OSError as error:
        raise NotAnInstance(f"the file cannot be read ({type(error).__name__})") from None
    except MemoryError:
        raise NotAnInstance("the header claims more memory than there is") from None
    except RecursionError:
        raise NotAnInstance("the header is nested too deeply") from None
    except Exception as error:  # whatever pydicom raises on damaged input; its text can hold values
        raise NotAnInstance(f"damaged DICOM header ({type(error).__name__})") from None


def _header_of(
    path: Path,
    size: int,
    dataset: Dataset,
    meta: FileMetaDataset,
    syntax: str,
    pixels: _Pixels | None,
    settings: IngestSettings,
    keep: Callable[[Any], Any],
) -> InstanceHeader | MaskObject:
    bad: list[str] = []
    fields = _Fields(dataset, bad)
    sop_class = fields.text("SOPClassUID") or str(meta.get("MediaStorageSOPClassUID") or "")
    sop_instance = fields.text("SOPInstanceUID") or str(meta.get("MediaStorageSOPInstanceUID") or "")
    if sop_class == DICOMDIR_CLASS:
        raise NotAnInstance("a DICOMDIR, an index and no image")
    if not sop_class:
        raise NotAnInstance("not a usable DICOM object: SOPClassUID is missing")
    identity = keep(_identity(fields))
    if sop_class in SEG_CLASSES or sop_class == RTSTRUCT_CLASS:
        return _mask_object(path, fields, identity, sop_class, sop_instance, syntax, pixels)
    is_ct = sop_class in CT_CLASSES or sop_class in ENHANCED_CT_CLASSES
    if pixels is None and not is_ct:
        raise NotAnInstance(f"no pixel data: {class_name(sop_class)}")
    shared = keep(_shared(fields, identity))
    frames = _frames(fields, sop_class, settings, bad, keep)
    faults = [*_pixel_faults(shared, fields, frames, syntax, pixels, settings), *dict.fromkeys(bad)]
    return InstanceHeader(
        path=path,
        file_bytes=size,
        sop_class_uid=keep(sop_class),
        sop_instance_uid=sop_instance,
        transfer_syntax_uid=keep(syntax),
        shared=shared,
        frames=frames,
        faults=tuple(dict.fromkeys(faults)),
        lossy=syntax in LOSSY or fields.text("LossyImageCompression") == "01",
    )


def _identity(fields: _Fields) -> PatientIdentity:
    return PatientIdentity(
        patient_name=fields.text("PatientName"),
        patient_id=fields.text("PatientID"),
        issuer_of_patient_id=fields.text("IssuerOfPatientID"),
        patient_birth_date=fields.text("PatientBirthDate"),
        patient_sex=fields.text("PatientSex"),
        accession_number=fields.text("AccessionNumber"),
        study_instance_uid=fields.text("StudyInstanceUID"),
        study_date=fields.text("StudyDate"),
        study_time=fields.text("StudyTime"),
        study_description=fields.text("StudyDescription"),
        referring_physician_name=fields.text("ReferringPhysicianName"),
    )


def _contrast(fields: _Fields) -> bool | None:
    if len(fields.items("ContrastBolusAgentSequence")):
        return True
    agent = fields.value("ContrastBolusAgent")
    if agent is None:
        return None
    return str(agent).strip().upper() not in ("", "NONE", "NO", "N")


def _shared(fields: _Fields, identity: PatientIdentity) -> SeriesHeader:
    return SeriesHeader(
        identity=identity,
        patient_age=fields.text("PatientAge"),
        study_id=fields.text("StudyID"),
        series_instance_uid=fields.text("SeriesInstanceUID"),
        series_number=fields.text("SeriesNumber"),
        series_date=fields.text("SeriesDate"),
        series_time=fields.text("SeriesTime"),
        frame_of_reference_uid=fields.text("FrameOfReferenceUID"),
        modality=fields.text("Modality"),
        spacing_between_slices_mm=_optional(fields, "SpacingBetweenSlices"),
        contrast_agent=_contrast(fields),
        manufacturer=fields.text("Manufacturer"),
        gantry_tilt_degrees=_optional(fields, "GantryDetectorTilt"),
        images_in_acquisition=int(_optional(fields, "ImagesInAcquisition") or 0) or None,
        rows=fields.whole("Rows"),
        columns=fields.whole("Columns"),
        samples_per_pixel=fields.whole("SamplesPerPixel") or 1,
        bits_allocated=fields.whole("BitsAllocated"),
        bits_stored=fields.whole("BitsStored"),
        pixel_representation=fields.whole("PixelRepresentation"),
        photometric_interpretation=fields.text("PhotometricInterpretation"),
        pixel_padding_value=_optional_whole(fields, "PixelPaddingValue"),
        pixel_padding_limit=_optional_whole(fields, "PixelPaddingRangeLimit"),
    )


def _optional(fields: _Fields, keyword: str) -> float | None:
    """A number that nothing hangs on: senseless is the same as missing."""
    return _Fields(fields._dataset, []).number(keyword)


def _optional_whole(fields: _Fields, keyword: str) -> int | None:
    return _Fields(fields._dataset, []).whole(keyword)


def _plane(
    place: _Fields,
    orientation: _Fields,
    measures: _Fields,
    values: _Fields,
    *,
    acquisition: str,
    temporal_position: str,
    convolution_kernel: str,
    kvp: float | None,
    image_type: tuple[str, ...],
    keep: Callable[[Any], Any],
) -> PlaneHeader:
    position = place.numbers("ImagePositionPatient", 3)
    cosines = orientation.numbers("ImageOrientationPatient", 6)
    spacing = measures.numbers("PixelSpacing", 2)
    return PlaneHeader(
        position_xyz=None if position is None else (position[0], position[1], position[2]),
        orientation_xyz=keep(cosines),
        pixel_spacing=keep(spacing),
        slice_thickness_mm=_optional(measures, "SliceThickness"),
        rescale_slope=values.number("RescaleSlope"),
        rescale_intercept=values.number("RescaleIntercept"),
        acquisition=keep(acquisition),
        temporal_position=keep(temporal_position),
        convolution_kernel=keep(convolution_kernel),
        kvp=kvp,
        image_type=keep(image_type),
    )


def _frames(
    fields: _Fields, sop_class: str, settings: IngestSettings, bad: list[str], keep: Callable[[Any], Any]
) -> tuple[PlaneHeader, ...]:
    image_type = tuple(part.upper() for part in fields.texts("ImageType"))
    count = fields.whole("NumberOfFrames")
    if count is not None and not 1 <= count <= settings.max_frames:
        bad.append(f"NumberOfFrames is {count}, outside 1 to {settings.max_frames}")
        count = 1
    if sop_class not in ENHANCED_CT_CLASSES:
        if count is not None and count > 1 and sop_class in CT_CLASSES:
            bad.append(f"NumberOfFrames is {count} in a single-frame SOP class")
        plane = _plane(
            fields,
            fields,
            fields,
            fields,
            acquisition=fields.text("AcquisitionNumber"),
            temporal_position=fields.text("TemporalPositionIdentifier"),
            convolution_kernel="/".join(fields.texts("ConvolutionKernel")),
            kvp=_optional(fields, "KVP"),
            image_type=image_type,
            keep=keep,
        )
        return (keep(plane),) * (count or 1) if count and count > 1 else (plane,)
    common = fields.item("SharedFunctionalGroupsSequence")
    per_frame = fields.items("PerFrameFunctionalGroupsSequence")
    if len(per_frame) != (count or 1):
        bad.append(
            f"PerFrameFunctionalGroupsSequence has {len(per_frame)} items for NumberOfFrames {count or 1}",
        )
        return (PlaneHeader(image_type=image_type),)
    return tuple(_enhanced_plane(_Fields(item, bad), common, fields, image_type, keep) for item in per_frame)


def _enhanced_plane(
    frame: _Fields, common: _Fields, fields: _Fields, image_type: tuple[str, ...], keep: Callable[[Any], Any]
) -> PlaneHeader:
    def group(keyword: str) -> _Fields:
        return frame.item(keyword) if len(frame.items(keyword)) else common.item(keyword)

    content, frame_type = group("FrameContentSequence"), group("CTImageFrameTypeSequence")
    return _plane(
        group("PlanePositionSequence"),
        group("PlaneOrientationSequence"),
        group("PixelMeasuresSequence"),
        group("PixelValueTransformationSequence"),
        acquisition=content.text("FrameAcquisitionNumber") or fields.text("AcquisitionNumber"),
        temporal_position="/".join(
            part for part in (content.text("TemporalPositionIndex"), content.text("StackID")) if part
        ),
        convolution_kernel="/".join(group("CTReconstructionSequence").texts("ConvolutionKernel")),
        kvp=_optional(group("CTXRayDetailsSequence"), "KVP"),
        image_type=tuple(part.upper() for part in frame_type.texts("FrameType")) or image_type,
        keep=keep,
    )


def _pixel_faults(
    shared: SeriesHeader,
    fields: _Fields,
    frames: tuple[PlaneHeader, ...],
    syntax: str,
    pixels: _Pixels | None,
    settings: IngestSettings,
) -> list[str]:
    """Nonsense and bombs, found by arithmetic alone."""
    faults = [
        f"{keyword} is missing"
        for keyword, value in (
            ("Rows", shared.rows),
            ("Columns", shared.columns),
            ("BitsAllocated", shared.bits_allocated),
        )
        if value is None
    ]
    if pixels is None:
        return [*faults, "no pixel data (PixelData is missing, or the file ends before it)"]
    if faults:
        return faults
    rows, columns, bits = shared.rows or 0, shared.columns or 0, shared.bits_allocated or 0
    if not 1 <= rows <= settings.max_rows_columns or not 1 <= columns <= settings.max_rows_columns:
        return [f"Rows {rows} and Columns {columns} are outside 1 to {settings.max_rows_columns}"]
    if bits not in (1, 8, 16, 32, 64):
        return [f"BitsAllocated is {bits}; 8 or 16 is what an image has"]
    if shared.bits_stored is not None and not 1 <= shared.bits_stored <= bits:
        return [f"BitsStored is {shared.bits_stored} with BitsAllocated {bits}"]
    if not 1 <= shared.samples_per_pixel <= 4:
        return [f"SamplesPerPixel is {shared.samples_per_pixel}"]
    declared_frames = fields.whole("NumberOfFrames")
    count = max(len(frames), declared_frames or 1)
    expected = (rows * columns * shared.samples_per_pixel * count * bits + 7) // 8
    if expected > settings.max_instance_bytes:
        return [f"the header claims {expected} bytes of pixels, the limit is {settings.max_instance_bytes}"]
    if not pixels.complete:
        return ["truncated: the file ends within the pixel data"]
    if syntax in UNCOMPRESSED and pixels.declared is not None and pixels.present < expected:
        return [f"truncated pixel data: {pixels.present} bytes where Rows, Columns and frames need {expected}"]
    if pixels.declared is None and syntax in UNCOMPRESSED:
        return ["PixelData is encapsulated though the transfer syntax is uncompressed"]
    if pixels.declared is not None and syntax not in UNCOMPRESSED:
        return [f"PixelData is not encapsulated as {syntax_name(syntax)} demands"]
    if pixels.present < 8 * count:
        return [f"NumberOfFrames is {count}, but there are only {pixels.present} bytes of pixel data"]
    return []


def _mask_object(
    path: Path,
    fields: _Fields,
    identity: PatientIdentity,
    sop_class: str,
    sop_instance: str,
    syntax: str,
    pixels: _Pixels | None,
) -> MaskObject:
    series: list[str] = []
    instances: list[str] = []
    frames_of_reference = [fields.text("FrameOfReferenceUID")]

    def note(items: Sequence[Dataset], images: str) -> None:
        for item in items:
            one = _Fields(item, [])
            series.append(one.text("SeriesInstanceUID"))
            instances.extend(_Fields(ref, []).text("ReferencedSOPInstanceUID") for ref in one.items(images))

    note(fields.items("ReferencedSeriesSequence"), "ReferencedInstanceSequence")
    for frame in fields.items("ReferencedFrameOfReferenceSequence"):
        one = _Fields(frame, [])
        frames_of_reference.append(one.text("FrameOfReferenceUID"))
        for study in one.items("RTReferencedStudySequence"):
            note(_Fields(study, []).items("RTReferencedSeriesSequence"), "ContourImageSequence")
    is_seg = sop_class in SEG_CLASSES
    faults = []
    if is_seg and pixels is None:
        faults.append("no pixel data")
    elif is_seg and pixels is not None and not pixels.complete:
        faults.append("truncated: the file ends within the pixel data")
    written = (
        fields.text("ContentDate") + fields.text("ContentTime")
        if is_seg
        else fields.text("StructureSetDate") + fields.text("StructureSetTime")
    )
    return MaskObject(
        path=path,
        kind="dicom-seg" if is_seg else "rtstruct",
        sop_class_uid=sop_class,
        sop_instance_uid=sop_instance,
        transfer_syntax_uid=syntax,
        study_instance_uid=identity.study_instance_uid,
        series_instance_uid=fields.text("SeriesInstanceUID"),
        identity=identity,
        frame_of_reference_uids=_distinct(frames_of_reference),
        referenced_series_uids=_distinct(series),
        referenced_sop_instance_uids=_distinct(instances),
        written=written,
        faults=tuple(faults),
    )


def _distinct(values: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(value for value in values if value))
