"""The rows of a cohort file joined with what the services left in the store: the table, and why rows are not in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from services.cohort.image_pass import ImagePass, Indexed
from services.cohort.protocols import Extraction
from services.cohort.rows import (
    CohortImage,
    MaskColumn,
    Progress,
)
from services.trainer.cohort_file import CohortError, CohortRow, patient_numbers
from services.trainer.cohort_table import CohortTable, Repeat, Repeated
from services.trainer.results import FlowStep
from shared.fracture import keys
from shared.fracture.csv_rows import RowFault
from shared.fracture.faults import group_of
from shared.fracture.features import FeatureVector
from shared.fracture.messages import (
    CaseReady,
)
from shared.fracture.records import (
    CaseRecord,
    DeadLetterNote,
    NotEvaluated,
    Rejection,
)
from shared.fracture.sagittal import sagittal_image
from shared.fracture.volume import mask_from_nrrd, volume_from_nrrd
from shared.pipeline.errors import FractureSweepError
from shared.records.archive import crop_files, find_record

_REPEATED: Final[Mapping[MaskColumn, Repeated]] = {"mask2": "intra", "mask3": "inter"}


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A row of the cohort file that has no features under a column of masks, and why (no identifiers in it)."""

    line: int
    column: MaskColumn
    step: str
    reason: str
    group: str
    """The reason without what belongs to the one case, for counting."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Cohort:
    """A cohort with its features. Tuples have one entry a row of the table, but `flow`, `left_out`, `mask_sources`."""

    table: CohortTable
    flow: tuple[FlowStep, ...]
    left_out: tuple[LeftOut, ...]
    ready: tuple[CaseReady, ...]
    """The cases as messages, for `deep_features`."""
    extraction: Extraction
    study: tuple[str, ...]
    """Pseudonymous, as `accession` ('' where there is none) and `image`."""
    accession: tuple[str, ...]
    image: tuple[str, ...]
    warnings: tuple[str, ...]
    mask_sources: tuple[str, ...]
    """Who made the masks of the rows, each once; '' stands for readers."""
    fingerprint: str
    """The SHA-256 of the cohort file."""

    @property
    def groups(self) -> Mapping[str, Sequence[str | int]]:
        """What must not lie on both sides of a split (services.trainer.split.check_disjoint)."""
        patients = [int(number) for number in self.table.patient]
        return {"patient": patients, "study": self.study, "accession": self.accession, "image": self.image}


@dataclass(frozen=True, kw_only=True)
class _Case:
    """A row's case with its features: where it lies, and what the table needs of it."""

    known: Indexed
    ready: CaseReady
    record: CaseRecord
    hcr: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """Joins the rows of a cohort with what the services left in the store."""

    rows: Sequence[CohortRow]
    images: Sequence[CohortImage]
    found: Mapping[int, Indexed | tuple[str, ...]]
    run: ImagePass
    progress: Progress

    def cohort(self, *, fingerprint: str) -> Cohort:
        """The table, with the way that its rows went."""
        names = _feature_names(self.run.extraction)
        cases: dict[tuple[int, MaskColumn], _Case | LeftOut] = {}
        for place, image in enumerate(self.images):
            for row in image.rows:
                cases[(row.line, image.column)] = self._case(row, image.column, self.found[place], names)
        of_rows: dict[int, _Case | LeftOut] = {row.line: cases[(row.line, "mask")] for row in self.rows}
        self._refuse_same_images(of_rows)
        pictures = self._pictures(of_rows)
        flow = _flow(self.rows, of_rows)
        kept = [row for row in self.rows if not isinstance(of_rows[row.line], LeftOut)]
        whole = [case for row in kept if isinstance(case := of_rows[row.line], _Case)]
        if not kept:
            reasons = "; ".join(sorted({one.group for one in of_rows.values() if isinstance(one, LeftOut)})[:5])
            raise FractureSweepError(f"no vertebra of the cohort has features: {reasons}")
        numbers = dict(
            zip((row.line for row in self.rows), patient_numbers([r.patient for r in self.rows]), strict=True)
        )
        acquisitions = [case.record.acquisition for case in whole]
        table = CohortTable(
            case_id=tuple(case.ready.case_id for case in whole),
            patient=np.array([numbers[row.line] for row in kept], dtype=np.int64),
            site=tuple(row.site for row in kept),
            split=tuple(row.split for row in kept),
            level=tuple(row.level for row in kept),
            acute=np.array([row.acute for row in kept], dtype=np.int64),
            age=np.array([row.age for row in kept], dtype=np.float64),
            male=np.array([row.sex == "M" for row in kept], dtype=np.float64),
            kernel=tuple(one.convolution_kernel or "" for one in acquisitions),
            kvp=np.array([np.nan if one.kvp is None else one.kvp for one in acquisitions], dtype=np.float64),
            hcr_names=names,
            hcr=np.stack([case.hcr for case in whole]),
            images=np.stack([pictures[row.line] for row in kept]),
            repeats=self._repeats(kept, cases),
        )
        left_out = tuple(one for one in [*of_rows.values(), *cases.values()] if isinstance(one, LeftOut))
        return Cohort(
            table=table,
            flow=flow,
            left_out=tuple(sorted(set(left_out), key=lambda one: (one.line, one.column))),
            ready=tuple(case.ready for case in whole),
            extraction=self.run.extraction,
            study=tuple(case.known.study_id for case in whole),
            accession=tuple(case.known.accession for case in whole),
            image=tuple(case.known.image_hash for case in whole),
            warnings=_warnings(cases),
            mask_sources=tuple(sorted({row.mask_source for row in kept})),
            fingerprint=fingerprint,
        )

    def _case(
        self, row: CohortRow, column: MaskColumn, known: Indexed | tuple[str, ...], names: tuple[str, ...]
    ) -> _Case | LeftOut:
        def out(step: str, reasons: Sequence[str]) -> LeftOut:
            return LeftOut(
                line=row.line, column=column, step=step, reason="; ".join(reasons), group=group_of(reasons[0])
            )

        if isinstance(known, tuple):
            return out(READ, known)
        store, extraction = self.run.store, self.run.extraction
        crop_hash, hcr_hash, scope = extraction.crop.crop_hash, extraction.hcr.hcr_hash, extraction.protocols.scope
        ready = self.run.case_ready(known, row.level)
        if ready is not None:
            record = find_record(store, keys.case_record(crop_hash, ready.case_id), CaseRecord)
            if record is not None and record.guards:
                return out(GUARDS, [guard.sentence for guard in record.guards])
            key = keys.hcr_features(hcr_hash, ready.case_id)
            if record is not None and store.exists(key):
                vector = FeatureVector.from_bytes(store.get(key))
                if vector.names != names:
                    raise FractureSweepError("the store holds features of another list under this protocol")
                return _Case(known=known, ready=ready, record=record, hcr=vector.values)
            not_evaluated = find_record(store, keys.outcome("not-evaluated", scope, ready.case_id), NotEvaluated)
            if not_evaluated is not None:
                return out(GUARDS, not_evaluated.reasons)
            rejected = find_record(store, keys.outcome("rejected", scope, ready.case_id), Rejection)
            if rejected is not None:
                return out(READ if record is None else FEATURES, rejected.reasons)
            dead = find_record(store, keys.outcome("dead-lettered", scope, ready.case_id), DeadLetterNote)
            if dead is not None:
                return out(FEATURES, [dead.reason])
        refused = find_record(store, keys.series_rejected(known.series_id, known.manifest_id), Rejection)
        if refused is not None:
            return out(READ, refused.reasons)
        lost = find_record(store, keys.series_dead_lettered(scope, known.series_id, known.manifest_id), DeadLetterNote)
        if lost is not None:
            return out(READ, [lost.reason])
        masks = self.run.mask_record(known)
        if masks is not None and row.level not in {*masks.levels, *masks.refused}:
            return out(READ, ["the mask does not hold the level of the row"])
        raise RuntimeError(f"line {row.line} of the cohort file came to no end; the log has the reason")

    def _refuse_same_images(self, cases: Mapping[int, _Case | LeftOut]) -> None:
        """What only the images themselves can say: one image under two paths, after all was read."""
        seen: dict[str, CohortRow] = {}
        levels: dict[str, int] = {}
        faults = []
        for row in self.rows:
            case = cases[row.line]
            if isinstance(case, LeftOut):
                continue
            first = seen.setdefault(case.known.image_hash, row)
            if first.patient != row.patient:
                text = f"is the image of another patient in line {first.line}"
                faults.append(RowFault(row.line, "image", text))
            line = levels.setdefault(case.ready.case_id, row.line)
            if line != row.line:
                faults.append(RowFault(row.line, "image", f"{row.level} of this image stands in line {line} already"))
        if faults:
            raise CohortError(faults)

    def _pictures(self, cases: dict[int, _Case | LeftOut]) -> Mapping[int, NDArray[np.float32]]:
        """The network's input of each row, from the stored crops; a row without one is left out of `cases`."""
        extraction = self.run.extraction
        pictures: dict[int, NDArray[np.float32]] = {}
        for done, (line, case) in enumerate(list(cases.items()), start=1):
            if isinstance(case, LeftOut):
                continue
            image, mask = crop_files(self.run.store, extraction.crop.crop_hash, case.ready.case_id)
            try:
                pictures[line] = sagittal_image(
                    volume_from_nrrd(image),
                    mask_from_nrrd(mask),
                    box=extraction.box,
                    box_margin_mm=extraction.box_margin_mm,
                    size=extraction.size,
                )
            except ValueError as error:
                reason = str(error)
                cases[line] = LeftOut(line=line, column="mask", step=PICTURES, reason=reason, group=group_of(reason))
            self.progress("pictures", done, len(cases))
        return pictures

    def _repeats(
        self, kept: Sequence[CohortRow], cases: Mapping[tuple[int, MaskColumn], _Case | LeftOut]
    ) -> dict[Repeated, Repeat]:
        repeats: dict[Repeated, Repeat] = {}
        for column, kind in _REPEATED.items():
            found = [
                (place, case.hcr)
                for place, row in enumerate(kept)
                if isinstance(case := cases.get((row.line, column)), _Case)
            ]
            if found:
                repeats[kind] = Repeat(
                    rows=np.array([place for place, _ in found], dtype=np.int64),
                    hcr=np.stack([values for _, values in found]),
                )
        return repeats


READ: Final = "images and masks that can be read"
GUARDS: Final = "vertebrae that the guards let pass"
FEATURES: Final = "hand-crafted features"
PICTURES: Final = "pictures for the network"
STEPS: Final = (READ, GUARDS, FEATURES, PICTURES)


def _flow(rows: Sequence[CohortRow], cases: Mapping[int, _Case | LeftOut]) -> tuple[FlowStep, ...]:
    """How many rows were left after each step, and why the others went."""
    left = list(rows)
    flow = [_step("rows of the cohort file", left, {})]
    for step in STEPS:
        out = Counter(one.group for row in left if isinstance(one := cases[row.line], LeftOut) and one.step == step)
        left = [row for row in left if not (isinstance(one := cases[row.line], LeftOut) and one.step == step)]
        flow.append(_step(step, left, dict(sorted(out.items()))))
    return tuple(flow)


def _step(name: str, rows: Sequence[CohortRow], left_out: dict[str, int]) -> FlowStep:
    acute = sum(row.acute for row in rows)
    return FlowStep(
        step=name,
        patients=len({row.patient for row in rows}),
        cases=len(rows),
        acute=acute,
        chronic=len(rows) - acute,
        left_out=left_out,
    )


def _warnings(cases: Mapping[tuple[int, MaskColumn], _Case | LeftOut]) -> tuple[str, ...]:
    """What a reader should know of the cases that are in the table, with how many have it and one of its sentences."""
    counts: Counter[str] = Counter()
    first: dict[str, str] = {}
    for (_, column), case in cases.items():
        if isinstance(case, _Case) and column == "mask":
            for warned in {group_of(one.sentence): one.sentence for one in case.record.warnings}.items():
                counts[warned[0]] += 1
                first.setdefault(*warned)
        elif isinstance(case, LeftOut) and column != "mask":
            reason = f"a repeated mask ({column}) was left out: {case.group}"
            counts[reason] += 1
            first.setdefault(reason, reason)
    return tuple(
        f"{count} {'row' if count == 1 else 'rows, the first'}: {first[group]}"
        for group, count in sorted(counts.items())
    )


def _feature_names(extraction: Extraction) -> tuple[str, ...]:
    from services.radiomics_extractor.extraction import feature_names

    return feature_names(extraction.parameters)
