"""The rows of COHORT.csv with their files: each row's pair judged as the CSV of pairs is, and rows of one image joined.

The image of a row is read with all levels of its masks, not with its own alone: so a case gets the id that a sweep over
the same study gives it, and what the sweep extracted is not extracted again. Only the row's level is cropped.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal

from services.dicom_ingest.label_maps import LabelMap
from services.dicom_ingest.pairs_csv import PairedImage, PairedMask, PairRow
from services.trainer.cohort_file import REPEAT_COLUMNS, CohortRow, FilesJudged, read_cohort
from services.trainer.settings import TrainingSettings
from shared.fracture.csv_rows import CsvRow, RowFault
from shared.fracture.ids import digest
from shared.fracture.protocol import RoiKind
from shared.fracture.records import Demographics

MaskColumn = Literal["mask", "mask2", "mask3"]
MASK_COLUMNS: Final[tuple[MaskColumn, ...]] = ("mask", *REPEAT_COLUMNS)
Progress = Callable[[str, int, int], None]
"""Told (what is done, how many are done, of how many)."""

_OF_THE_PAIR: Final = ("image", "mask", "labels", "roi", "body", "body_labels", *REPEAT_COLUMNS)
_HEAD_BYTES: Final = 8192


def silent(what: str, done: int, total: int) -> None:
    """Progress that nobody sees."""


@dataclass(frozen=True, kw_only=True)
class CohortImage:
    """An image under the masks of one column, and the rows whose vertebrae are in it.

    `content` names files and columns: the same for the same, until a file is changed.
    """

    pair: PairedImage
    column: MaskColumn
    rows: tuple[CohortRow, ...]
    content: str

    @property
    def levels(self) -> frozenset[str]:
        """The levels that are wanted of it."""
        return frozenset(row.level for row in self.rows)


@dataclass(frozen=True, kw_only=True)
class FileIdentity:
    """What a file is, without reading all of it: its size, and the SHA-256 of its beginning and end.

    A DICOM header (with its UIDs) and the first compressed voxels lie in the beginning, so that two files that are
    alike in this are nearly always the same; `same_content` makes sure.
    """

    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileIdentity:
        """The identity of a file. OSError where it cannot be read."""
        size = path.stat().st_size
        with path.open("rb") as stream:
            known = hashlib.sha256(stream.read(_HEAD_BYTES))
            if size > 2 * _HEAD_BYTES:
                stream.seek(-_HEAD_BYTES, 2)
            known.update(stream.read(_HEAD_BYTES))
        return cls(size=size, sha256=known.hexdigest())


def same_content(one: Path, other: Path) -> bool:
    """Whether two files hold the same bytes."""
    with one.open("rb") as first, other.open("rb") as second:
        return hashlib.file_digest(first, "sha256").digest() == hashlib.file_digest(second, "sha256").digest()


@dataclass(kw_only=True)
class PairJudge:
    """Judges the columns of the pairs and the files behind them; keeps, line by line, what was right.

    `base`: the CSV's folder; `roi`: what the model is to be trained on.
    """

    base: Path
    roi: RoiKind
    progress: Progress = silent
    pairs: dict[int, dict[MaskColumn, PairRow]] = field(default_factory=dict)
    _identities: dict[Path, FileIdentity] = field(default_factory=dict)

    def __call__(self, rows: Sequence[CsvRow]) -> FilesJudged:
        """The faults of all rows' files (services.trainer.cohort_file.JudgeFiles)."""
        faults: list[RowFault] = []
        maps: dict[str, LabelMap | str] = {}
        for row in rows:
            self.pairs[row.line] = self._judged(row, maps, faults)
        images = {
            line: pair["mask"].image.resolve() for line, pair in self.pairs.items() if pair["mask"].image is not None
        }
        faults += self._disagreements(images)
        faults += self._same_images(images, {row.line: row.values.get("patient", "") for row in rows})
        return FilesJudged(faults=tuple(faults), images={line: str(path) for line, path in images.items()})

    def _judged(
        self, row: CsvRow, maps: dict[str, LabelMap | str], faults: list[RowFault]
    ) -> dict[MaskColumn, PairRow]:
        values = {name: text for name, text in row.values.items() if name in _OF_THE_PAIR}
        judged: dict[MaskColumn, PairRow] = {}
        for column in MASK_COLUMNS:
            if column != "mask" and not values.get(column):
                continue
            one = PairRow(
                line=row.line,
                values=values,
                base=self.base,
                maps=maps,
                faults=faults,
                mask_column=column,
                dicom_masks=True,
            )
            one.judge(default_labels=None, default_roi=None)
            judged[column] = one
        image = judged["mask"].image
        if image is not None and self.base.resolve().is_relative_to(image.resolve()):
            faults.append(RowFault(row.line, "image", "holds the cohort file itself: give the folder of one series"))
            judged["mask"].image = None
        first = judged["mask"].mask
        if first is None:
            return judged
        if first.roi is not None and first.roi != self.roi and not first.bodies:
            held, wanted = {"body": ("bodies", "whole vertebrae"), "vertebra": ("whole vertebrae", "bodies")}[first.roi]
            hint = ": give a body mask to cut them by" if self.roi == "body" else ""
            faults.append(RowFault(row.line, "roi", f"the mask holds {held}, the settings train on {wanted}{hint}"))
        for column in REPEAT_COLUMNS:
            other = judged[column].mask if column in judged else None
            if other is not None and self._same_mask(first, other):
                faults.append(RowFault(row.line, column, "is the same as mask: a repeated reading is another file"))
        return judged

    def _same_mask(self, one: PairedMask, other: PairedMask) -> bool:
        return any(
            mine.resolve() == its.resolve() or (self._alike(mine, its) and same_content(mine, its))
            for mine in one.masks
            for its in other.masks
        )

    def _alike(self, one: Path, other: Path) -> bool:
        try:
            return self._identity(one) == self._identity(other)
        except OSError:
            return False

    def _identity(self, path: Path) -> FileIdentity:
        if path not in self._identities:
            self._identities[path] = FileIdentity.of(path)
        return self._identities[path]

    def _disagreements(self, images: Mapping[int, Path]) -> list[RowFault]:
        faults = []
        first_of: dict[tuple[Path, MaskColumn], int] = {}
        for line, path in images.items():
            for column, judged in self.pairs[line].items():
                if judged.mask is None:
                    continue
                first = first_of.setdefault((path, column), line)
                before = self.pairs[first][column].mask
                if before is None:
                    continue
                for name, ours, theirs in (
                    (column, judged.mask.dicom, before.dicom),
                    ("roi", judged.mask.roi, before.roi),
                    ("body", bool(judged.mask.bodies), bool(before.bodies)),
                ):
                    if ours != theirs:
                        differs = f"differs in kind from line {first}, which names the same image"
                        faults.append(RowFault(line, name, differs))
        return faults

    def _same_images(self, images: Mapping[int, Path], patients: Mapping[int, str]) -> list[RowFault]:
        """Images whose files are the same under two paths: then one patient or vertebra would be there twice."""
        faults = []
        lines: dict[Path, int] = {}
        for line, path in images.items():
            lines.setdefault(path, line)
        seen: dict[FileIdentity, tuple[Path, Path]] = {}
        for done, (path, line) in enumerate(lines.items(), start=1):
            for file in image_files(path):
                try:
                    known = self._identity(file)
                    image, twin = seen.setdefault(known, (path, file))
                    if image == path or not same_content(file, twin):
                        continue
                except OSError:
                    faults.append(RowFault(line, "image", "cannot be read"))
                    break
                other = lines[image]
                whose = "another patient's image" if patients[line] != patients[other] else "the image"
                faults.append(RowFault(line, "image", f"holds the same files as {whose} in line {other}"))
                break
            self.progress("images checked", done, len(lines))
        return faults

    def content(self, pair: PairedImage, values: Mapping[str, str]) -> str:
        """Names an image's files and how they are read."""
        files = [
            [str(file.resolve()), (known := self._identity(file)).size, known.sha256, file.stat().st_mtime_ns]
            for path in pair.files
            for file in image_files(path)
        ]
        masks = [
            {
                "labels": {str(value): level for value, level in mask.labels.levels.items()},
                "roi": mask.roi,
                "body_labels": list(mask.body_labels),
                "masks": len(mask.masks),
            }
            for mask in pair.masks
        ]
        return digest({"files": files, "masks": masks, **values})


def image_files(path: Path) -> list[Path]:
    """The files of an image: itself, or those of DICOM in a folder (told by their preamble; no link is followed)."""
    if not path.is_dir():
        return [path]
    files = [Path(folder) / name for folder, _, names in os.walk(path) for name in names]
    return sorted(file for file in files if _is_regular(file) and _has_preamble(file))


def _is_regular(file: Path) -> bool:
    try:
        return stat.S_ISREG(file.lstat().st_mode)
    except OSError:
        return False


def _has_preamble(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:
        return False


def read_rows_with_files(
    path: Path, *, settings: TrainingSettings, roi: RoiKind, fitting: bool, progress: Progress = silent
) -> tuple[tuple[CohortRow, ...], PairJudge]:
    """The rows of a cohort file and their files, all judged. CohortError with all faults."""
    judge = PairJudge(base=path.parent, roi=roi, progress=progress)
    return read_cohort(path, settings=settings, judge_files=judge, fitting=fitting), judge


def images_of(rows: Sequence[CohortRow], judge: PairJudge, *, columns: Sequence[MaskColumn]) -> Iterator[CohortImage]:
    """Each image of the rows, once for every column of masks that some of its rows fill."""
    grouped: dict[Path, list[CohortRow]] = {}
    for row in rows:
        image = judge.pairs[row.line]["mask"].image
        if image is None:
            raise RuntimeError("a row without an image was not refused")
        grouped.setdefault(image.resolve(), []).append(row)
    for group in grouped.values():
        for column in columns:
            chosen = [row for row in group if column in judge.pairs[row.line]]
            if chosen:
                yield _joined(chosen, judge, column)


def _joined(rows: Sequence[CohortRow], judge: PairJudge, column: MaskColumn) -> CohortImage:
    masks: list[PairedMask] = []
    for row in rows:
        mask = judge.pairs[row.line][column].mask
        if mask is None:
            raise RuntimeError("a row without a mask was not refused")
        whole = replace(mask, line=0, levels=())
        if whole not in masks:
            masks.append(whole)
    first = rows[0]
    image = judge.pairs[first.line][column].image
    if image is None:
        raise RuntimeError("a row without an image was not refused")
    pair = PairedImage(
        image=image,
        masks=tuple(masks),
        study=first.study,
        patient=first.patient,
        demographics=Demographics(age_years=first.age, sex=first.sex),
    )
    values = {"study": first.study, "patient": first.patient, "age": str(first.age), "sex": first.sex}
    return CohortImage(pair=pair, column=column, rows=tuple(rows), content=judge.content(pair, values))
