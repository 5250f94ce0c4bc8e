"""The CSV of pairs as a source of studies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from services.dicom_ingest.collected import CollectedSeries, PatientIdentity
from services.dicom_ingest.pairs_csv import PairedImage, collect_pair
from services.dicom_ingest.settings import IngestSettings
from services.dicom_ingest.sweep import CollectedFile, CollectedStudy
from shared.fracture.ids import sha256_hex

IdentifiedFolder = Callable[[Path], tuple[CollectedSeries, PatientIdentity]]
"""Reads the one DICOM series of a folder, and whose it is."""


class PairsSource:
    """Each image of a CSV is one series of a study of its own, or of the study that its row names."""

    def __init__(
        self,
        images: Sequence[PairedImage],
        *,
        read_folder: IdentifiedFolder,
        base: Path,
        limits: IngestSettings | None = None,
    ) -> None:
        self._images = images
        self._limits = limits
        self._read_folder = read_folder
        self._base = base
        self._files: list[CollectedFile] = []
        groups: dict[str, list[PairedImage]] = {}
        for number, image in enumerate(images):
            groups.setdefault(image.study or f"#{number}", []).append(image)
        self._groups = groups

    @property
    def total(self) -> int:
        """How many studies the CSV names."""
        return len(self._groups)

    def studies(self) -> Iterator[CollectedStudy]:
        """The studies in the CSV's order."""
        for group in self._groups.values():
            yield self._study(group)

    def _study(self, group: Sequence[PairedImage]) -> CollectedStudy:
        first = group[0]
        identity = PatientIdentity(
            patient_id=first.patient, study_instance_uid=f"csv:{first.study}" if first.study else ""
        )
        if len(group) > 1 or not first.image.is_dir():
            return CollectedStudy(identity=identity, series=(self._collect(image)[0] for image in group))
        series, found = self._collect(first)
        known = replace(
            found,
            patient_id=first.patient or found.patient_id,
            study_instance_uid=identity.study_instance_uid or found.study_instance_uid,
        )
        return CollectedStudy(identity=known, series=(series,))

    def _collect(self, image: PairedImage) -> tuple[CollectedSeries, PatientIdentity]:
        identity = PatientIdentity()

        def read_folder(path: Path) -> CollectedSeries:
            nonlocal identity
            series, identity = self._read_folder(path)
            return series

        series = collect_pair(image, read_folder=read_folder, limits=self._limits)
        if not series.series_instance_uid and not series.content_sha256:
            series = replace(series, content_sha256=sha256_hex(str(image.image.resolve()).encode()))
        for number, path in enumerate(image.files):
            for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                if file.is_file():
                    self._files.append(CollectedFile(path=self._shown(file), role="image" if number == 0 else "mask"))
        images = [image.image] if image.image.is_file() else sorted(image.image.rglob("*"))
        return replace(series, files=tuple(self._shown(path) for path in images)), identity

    def _shown(self, path: Path) -> str:
        return path.relative_to(self._base).as_posix() if path.is_relative_to(self._base) else str(path)

    def files(self) -> tuple[CollectedFile, ...]:
        """Every file that the CSV names, once; complete after the studies were iterated."""
        return tuple({file.path: file for file in self._files}.values())
