"""The CSV of pairs: one row an image with its mask, as research groups and segmentation tools hold them.

Everything is said by columns and nothing guessed from file names. The whole file is judged before the first volume is
read, and all its faults are told together. docs/masks.md describes the columns. File names and the ids in the columns
are identifiers: they stand in the error for the user who gave the file, and nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal

import numpy as np

from services.dicom_ingest.collected import CollectedMask, CollectedSeries
from services.dicom_ingest.headers import MaskObject, NotAnInstance, read_header
from services.dicom_ingest.label_maps import LARGEST_LABEL, LabelMap, LabelMapError, is_level, load_label_map
from services.dicom_ingest.level_masks import LevelMask, MaskRefused, ReadMask, merge_levels
from services.dicom_ingest.mask_choice import masks_of_series
from services.dicom_ingest.masks_nifti import (
    MAX_VOXELS,
    NiftiRefused,
    content_sha256,
    read_label_values,
    read_nifti_mask,
    read_nifti_volume,
)
from services.dicom_ingest.settings import IngestSettings
from shared.fracture.csv_rows import PAIR_COLUMNS, RowFault, read_rows
from shared.fracture.levels import sort_key
from shared.fracture.protocol import RoiKind
from shared.fracture.records import OLDEST_TOLD, Acquisition, Demographics, Warned
from shared.fracture.volume import Geometry, Mask, Volume
from shared.pipeline.errors import FractureSweepError

COLUMNS: Final = PAIR_COLUMNS
REQUIRED: Final = ("image", "mask")
MAX_CSV_BYTES: Final = 50_000_000
_SHOWN_FAULTS: Final = 100

ReadFolder = Callable[[Path], CollectedSeries]
"""Reads the one DICOM series of a folder (folder.py)."""


class PairsError(FractureSweepError):
    """The CSV cannot be used; the text lists all its faults, with line and column. `faults` holds them one by one."""

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        shown = [f"  {fault}" for fault in self.faults[:_SHOWN_FAULTS]]
        more = [f"  … and {len(self.faults) - _SHOWN_FAULTS} more"] if len(self.faults) > _SHOWN_FAULTS else []
        count = len(self.faults)
        super().__init__("\n".join([f"the CSV of pairs has {count} fault{'s' if count > 1 else ''}:", *shown, *more]))


@dataclass(frozen=True, kw_only=True)
class PairedMask:
    """The masks of one row."""

    line: int
    masks: tuple[Path, ...]
    labels: LabelMap
    roi: RoiKind | None
    """None for DICOM masks alone, whose codes and names say it."""
    dicom: bool = False
    """The masks are DICOM SEG or RTSTRUCT; `labels` are not looked at."""
    bodies: tuple[Path, ...] = ()
    body_labels: tuple[int, ...] = ()
    """Values of the body masks that are bodies; none: every value above 0."""
    levels: tuple[str, ...] = ()
    """Score these alone; none: all."""


@dataclass(frozen=True, kw_only=True)
class PairedImage:
    """One image with all its masks."""

    image: Path
    masks: tuple[PairedMask, ...]
    study: str = ""
    """'' = the content names it."""
    patient: str = ""
    demographics: Demographics = field(default_factory=Demographics)

    @property
    def files(self) -> tuple[Path, ...]:
        """Every path that the rows of this image name, each once."""
        of_rows = [path for mask in self.masks for path in (*mask.masks, *mask.bodies)]
        return tuple(dict.fromkeys([self.image, *of_rows]))


def read_pairs(
    csv_path: Path, *, default_labels: str | None = None, default_roi: RoiKind | None = None
) -> tuple[PairedImage, ...]:
    """The images of a CSV of pairs. Raises PairsError with all faults of the file.

    `default_labels` (totalseg, verse, a JSON file) and `default_roi` hold where a row's column is empty or absent; a
    JSON file among the defaults is relative to the working folder, one in the CSV to the CSV.
    """
    try:
        if csv_path.stat().st_size > MAX_CSV_BYTES:
            raise PairsError([f"it is larger than {MAX_CSV_BYTES} bytes: this is no CSV of pairs"])
        text = csv_path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise PairsError(["it is not UTF-8 text: save it as CSV UTF-8"]) from error
    except OSError as error:
        raise PairsError(["it cannot be read"]) from error
    fallback: LabelMap | None = None
    if default_labels:
        try:
            fallback = load_label_map(default_labels, base=Path())
        except LabelMapError as error:
            raise PairsError([f"default labels: {error}"]) from error
    return parse_pairs(text, base=csv_path.parent, default_labels=fallback, default_roi=default_roi)


def parse_pairs(
    text: str, *, base: Path, default_labels: LabelMap | None, default_roi: RoiKind | None
) -> tuple[PairedImage, ...]:
    """The images of a CSV's text, whose paths are relative to `base`. Raises PairsError with all faults."""
    rows, found = read_rows(text, columns=COLUMNS, required=REQUIRED, what="CSV of pairs")
    if not rows:
        raise PairsError([str(fault) for fault in found])
    faults = list(found)
    maps: dict[str, LabelMap | str] = {}
    read: list[PairRow] = []
    for one in rows:
        judged = PairRow(line=one.line, values=one.values, base=base, maps=maps, faults=faults)
        judged.judge(default_labels=default_labels, default_roi=default_roi)
        read.append(judged)
    images = _by_image(read, faults)
    if faults:
        raise PairsError([str(fault) for fault in sorted(faults, key=lambda fault: fault.line)])
    return images


class PairRow:
    """One row while it is judged: collects its faults and the parts that were right.

    `mask_column` is where the masks stand. With `dicom_masks` a mask may be a DICOM SEG or RTSTRUCT of the image's
    series: its codes and names say the levels, so it needs no labels, and `roi` only where they do not say it.
    """

    def __init__(
        self,
        *,
        line: int,
        values: Mapping[str, str],
        base: Path,
        maps: dict[str, LabelMap | str],
        faults: list[RowFault],
        mask_column: str = "mask",
        dicom_masks: bool = False,
    ) -> None:
        self.line = line
        self._values = values
        self._base = base
        self._maps = maps
        self._faults = faults
        self._mask_column = mask_column
        self._dicom_masks = dicom_masks
        self.image: Path | None = None
        self.mask: PairedMask | None = None
        self.study = values.get("study", "")
        self.patient = values.get("patient", "")
        self.age: int | None = None
        self.sex: Literal["F", "M"] | None = None

    def _fault(self, column: str, text: str) -> None:
        self._faults.append(RowFault(self.line, column, text))

    def judge(self, *, default_labels: LabelMap | None, default_roi: RoiKind | None) -> None:
        """Judge every column of the pair."""
        before = len(self._faults)
        self.image = self._path("image", self._values["image"], folders=True)
        masks = self._paths(self._mask_column, dicom=self._dicom_masks)
        dicom = self._are_dicom(masks)
        labels = None if dicom else self._labels(default_labels)
        roi = default_roi if dicom and not self._values.get("roi") else self._roi(default_roi)
        bodies = self._paths("body", required=False)
        if bodies and roi == "body":
            self._fault("body", "the mask holds bodies already (roi is body): nothing to cut")
        body_labels = self._body_labels(bodies)
        levels = self._levels()
        self.age = self._age()
        self.sex = self._sex()
        if len(self._faults) == before and (dicom or (labels is not None and roi is not None)):
            self.mask = PairedMask(
                line=self.line,
                masks=masks,
                labels=labels or LabelMap(levels={}),
                dicom=dicom,
                roi=roi,
                bodies=bodies,
                body_labels=body_labels,
                levels=levels,
            )

    def _list(self, column: str) -> list[str]:
        return [part.strip() for part in self._values.get(column, "").split(";") if part.strip()]

    def _are_dicom(self, masks: tuple[Path, ...]) -> bool:
        kinds = {_is_nifti_name(path) for path in masks}
        if len(kinds) > 1:
            self._fault(self._mask_column, "names NIfTI and DICOM masks: give one kind")
        if False not in kinds:
            return False
        if self.image is not None and not self.image.is_dir():
            self._fault(self._mask_column, "is DICOM, the image is not: give a NIfTI mask")
        if self._list("body"):
            self._fault("body", "cuts NIfTI masks alone, and the mask is DICOM")
        return True

    def _path(self, column: str, value: str, *, folders: bool, dicom: bool = False) -> Path | None:
        if not value:
            self._fault(column, "is empty")
            return None
        try:
            path = self._base / value
            if path.is_dir():
                if not folders:
                    self._fault(column, f"{value!r} is a folder, a NIfTI file is needed")
                    return None
                return path
            if not path.is_file():
                self._fault(column, f"{value!r} does not exist")
                return None
        except (OSError, ValueError):
            self._fault(column, "is no path")
            return None
        if not _is_nifti_name(path) and not (dicom and _is_dicom_file(path)):
            what = "a NIfTI file (.nii, .nii.gz) or a folder with one DICOM series" if folders else "a NIfTI file"
            if dicom:
                what += ", nor a DICOM SEG or RTSTRUCT"
            self._fault(column, f"{value!r} is not {what}")
            return None
        return path

    def _paths(self, column: str, *, required: bool = True, dicom: bool = False) -> tuple[Path, ...]:
        parts = self._list(column)
        if not parts and required:
            self._fault(column, "is empty")
        found = [self._path(column, part, folders=False, dicom=dicom) for part in parts]
        paths = tuple(path for path in found if path is not None)
        if len(set(paths)) < len(paths):
            self._fault(column, "names the same file twice")
        return paths

    def _labels(self, default: LabelMap | None) -> LabelMap | None:
        name = self._values.get("labels", "")
        if not name:
            if default is None:
                self._fault("labels", "is empty: say totalseg, verse, or a JSON file (here, or for all by --labels)")
            return default
        if name not in self._maps:
            try:
                self._maps[name] = load_label_map(name, base=self._base)
            except LabelMapError as error:
                self._maps[name] = str(error)
        found = self._maps[name]
        if isinstance(found, LabelMap):
            return found
        self._fault("labels", found)
        return None

    def _roi(self, default: RoiKind | None) -> RoiKind | None:
        value = self._values.get("roi", "")
        if value == "body":
            return "body"
        if value == "vertebra":
            return "vertebra"
        if value:
            self._fault("roi", f"{value!r} is neither body nor vertebra")
        elif default is None:
            self._fault("roi", "is empty: say what the mask holds, body or vertebra")
        return default if not value else None

    def _body_labels(self, bodies: Sequence[Path]) -> tuple[int, ...]:
        parts = self._list("body_labels")
        if parts and not self._list("body"):
            self._fault("body_labels", "there is no body mask whose values these could be")
        values = []
        for part in parts:
            if not re.fullmatch(r"[0-9]{1,5}", part) or not 1 <= int(part) <= LARGEST_LABEL:
                self._fault("body_labels", f"{part!r} is no label value (whole numbers above 0, separated by ;)")
            else:
                values.append(int(part))
        return tuple(sorted(set(values))) if bodies else ()

    def _levels(self) -> tuple[str, ...]:
        levels = []
        for part in self._list("levels"):
            if is_level(part):
                levels.append(part)
            else:
                self._fault("levels", f"{part!r} is no level (C1…C7, T1…T13, L1…L6, S1; separated by ;)")
        return tuple(sorted(set(levels), key=sort_key))

    def _age(self) -> int | None:
        value = self._values.get("age", "")
        if not value:
            return None
        if not re.fullmatch(r"[0-9]{1,3}", value) or int(value) > 120:
            self._fault("age", f"{value!r} is no age in whole years from 0 to 120")
            return None
        return min(int(value), OLDEST_TOLD)

    def _sex(self) -> Literal["F", "M"] | None:
        value = self._values.get("sex", "")
        if value == "F":
            return "F"
        if value == "M":
            return "M"
        if value:
            self._fault("sex", f"{value!r} is neither F nor M (leave it empty where unknown)")
        return None


def _is_nifti_name(path: Path) -> bool:
    return path.name.lower().endswith((".nii", ".nii.gz"))


def _is_dicom_file(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _by_image(rows: Sequence[PairRow], faults: list[RowFault]) -> tuple[PairedImage, ...]:
    grouped: dict[Path, list[PairRow]] = {}
    for row in rows:
        if row.image is not None:
            grouped.setdefault(row.image.resolve(), []).append(row)
    images = []
    for group in grouped.values():
        first = group[0]
        for row in group[1:]:
            for column, ours, theirs in (
                ("study", row.study, first.study),
                ("patient", row.patient, first.patient),
                ("age", row.age, first.age),
                ("sex", row.sex, first.sex),
                ("roi", row.mask and row.mask.roi, first.mask and first.mask.roi),
                ("body", row.mask and bool(row.mask.bodies), first.mask and bool(first.mask.bodies)),
            ):
                if ours is not None and theirs is not None and ours != theirs:
                    text = f"differs from line {first.line}, which names the same image"
                    faults.append(RowFault(row.line, column, text))
            if row.mask and first.mask and set(row.mask.masks) & set(first.mask.masks):
                faults.append(RowFault(row.line, "mask", f"the same image and mask as line {first.line}"))
        if first.image is not None:
            age = next((row.age for row in group if row.age is not None), None)
            sex = next((row.sex for row in group if row.sex is not None), None)
            images.append(
                PairedImage(
                    image=first.image,
                    masks=tuple(row.mask for row in group if row.mask is not None),
                    study=first.study,
                    patient=first.patient,
                    demographics=Demographics(age_years=age, sex=sex),
                )
            )
    patients: dict[str, str] = {}
    for row in rows:
        if row.study and patients.setdefault(row.study, row.patient) != row.patient:
            faults.append(RowFault(row.line, "patient", "this study belongs to another patient in a line above"))
    return tuple(images)


def collect_pair(
    pair: PairedImage,
    *,
    read_folder: ReadFolder,
    max_voxels: int = MAX_VOXELS,
    limits: IngestSettings | None = None,
) -> CollectedSeries:
    """The volume of an image with its masks on its grid; what is refused says why and costs only itself.

    `read_folder` reads the one DICOM series of a folder; demographics of the CSV hold before those of DICOM. `limits`
    are those of DICOM masks.
    """
    series = read_folder(pair.image) if pair.image.is_dir() else nifti_series(pair.image, max_voxels=max_voxels)
    known = pair.demographics
    series = replace(
        series,
        demographics=Demographics(
            age_years=known.age_years if known.age_years is not None else series.demographics.age_years,
            sex=known.sex or series.demographics.sex,
        ),
    )
    if series.volume is None:
        return series
    if any(row.dicom for row in pair.masks):
        mask, faults = _dicom_masks(pair, series, limits or IngestSettings())
    else:
        mask, faults = paired_masks(pair, series.volume.geometry)
    return replace(series, mask=mask, mask_faults=faults)


def _dicom_masks(
    pair: PairedImage, series: CollectedSeries, limits: IngestSettings
) -> tuple[CollectedMask | None, tuple[str, ...]]:
    """As the masks of a study in a folder, but for those that the rows name alone."""
    objects: list[MaskObject] = []
    faults: list[str] = []
    for path in dict.fromkeys(path for row in pair.masks for path in row.masks):
        try:
            header = read_header(path, limits)
        except NotAnInstance as error:
            faults.append(f"the mask cannot be used: {error.reason}")
            continue
        if isinstance(header, MaskObject):
            objects.append(header)
        else:
            faults.append("the mask is an image, neither DICOM SEG nor RTSTRUCT")
    if not objects:
        return None, tuple(dict.fromkeys(faults))
    roi = next((row.roi for row in pair.masks if row.roi is not None), None)
    mask, more = masks_of_series(series, objects, seg_roi=roi or limits.seg_roi)
    return mask, tuple(dict.fromkeys([*faults, *more]))


def nifti_series(path: Path, *, max_voxels: int = MAX_VOXELS) -> CollectedSeries:
    """A NIfTI image as a series: a volume, or the reasons why there is none."""
    try:
        volume, warnings = read_nifti_volume(path, max_voxels=max_voxels)
    except NiftiRefused as error:
        return CollectedSeries(
            series_instance_uid="", modality="CT", instances=1, reasons=(f"the image {error}",), description="NIfTI"
        )
    spacing = _slice_spacing(volume.geometry)
    return CollectedSeries(
        series_instance_uid="",
        modality="CT",
        instances=1,
        volume=volume,
        content_sha256=content_sha256(volume),
        acquisition=Acquisition(slice_spacing_mm=spacing),
        warnings=warnings,
        description=f"NIfTI, {_axial_slices(volume)} slices of {spacing:.1f} mm",
    )


def _slice_axis(geometry: Geometry) -> int:
    """The array axis nearest to head–foot."""
    return int(np.abs(np.asarray(geometry.direction_zyx)[0]).argmax())


def _slice_spacing(geometry: Geometry) -> float:
    return geometry.spacing_zyx[_slice_axis(geometry)]


def _axial_slices(volume: Volume) -> int:
    return volume.geometry.shape_zyx[_slice_axis(volume.geometry)]


def paired_masks(pair: PairedImage, geometry: Geometry) -> tuple[CollectedMask | None, tuple[str, ...]]:
    """The masks of an image's rows merged into one label map on its grid, and why masks were refused."""
    faults: list[str] = []
    read: list[ReadMask] = []
    wanted: list[LevelMask] = []
    not_chosen: set[str] = set()
    for row in pair.masks:
        if row.roi is None:
            raise ValueError("a row of NIfTI masks says what they hold, body or vertebra")
        for path in row.masks:
            try:
                one = read_nifti_mask(path, geometry, label_map=row.labels, roi=row.roi)
            except MaskRefused as error:
                faults.append(_of_mask(str(error)))
                continue
            read.append(one)
            wanted.extend(mask for mask in one.levels if not row.levels or mask.level in row.levels)
            not_chosen.update(mask.level for mask in one.levels if row.levels and mask.level not in row.levels)
    ignored = sum(one.ignored_labels for one in read)
    unknown = tuple(dict.fromkeys(label for one in read for label in one.unknown_labels))
    if not wanted:
        if read and not_chosen:
            faults.append("the mask has none of the levels that `levels` names")
        elif read and unknown:
            faults.append(f"a mask label without a level: {', '.join(unknown[:10])}")
        elif read:
            faults.append("the mask holds no vertebra")
        return None, tuple(dict.fromkeys(faults))
    try:
        body = _body_mask(pair, geometry)
    except MaskRefused as error:
        return None, tuple(dict.fromkeys([*faults, f"the body mask cannot be used: {error}"]))
    merged = merge_levels(wanted, geometry=geometry, default_roi=None)
    asked = {level for row in pair.masks for level in row.levels}
    absent = sorted(asked - {mask.level for mask in wanted}, key=sort_key)
    warnings = [warning for one in read for warning in one.warnings]
    if absent:
        sentence = f"the CSV asks for {', '.join(absent)}, which the mask does not hold"
        warnings.append(Warned(code="level-absent", sentence=sentence))
    chosen = {mask.level for mask in wanted}
    mask = CollectedMask(
        source="nifti",
        roi_kind=merged.roi_kind,
        labels=merged.labels,
        levels=merged.levels,
        body=body,
        refused=merged.refused,
        not_chosen=tuple(sorted(not_chosen - chosen, key=sort_key)),
        ignored_labels=ignored,
        unknown_labels=unknown,
        warnings=(*warnings, *merged.warnings),
    )
    return mask, tuple(dict.fromkeys(faults))


def _of_mask(reason: str) -> str:
    return reason if reason.startswith(("a mask", "the mask")) else f"the mask {reason}"


def _body_mask(pair: PairedImage, geometry: Geometry) -> Mask | None:
    bodies = [(path, row.body_labels) for row in pair.masks for path in row.bodies]
    if not bodies:
        return None
    voxels = np.zeros(geometry.shape_zyx, dtype=np.uint8)
    for path, wanted in dict.fromkeys(bodies):
        values, _ = read_label_values(path, geometry)
        inside = np.isin(values, np.asarray(wanted, dtype=np.uint16)) if wanted else values > 0
        voxels[inside] = 1
    if not voxels.any():
        raise MaskRefused("none of its voxels has one of the values in body_labels")
    return Mask(voxels=voxels, geometry=geometry)
