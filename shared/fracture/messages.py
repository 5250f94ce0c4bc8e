"""The facts that services tell each other: past tense, frozen, ids and hashes alone.

A fact never holds pixels, UIDs or anything that names a patient. What it speaks of lies in the store under keys that
`shared.fracture.keys` derives from these ids. Membership of a sweep lies in the store too, never here.

How a fact may change (docs/decisions/0012-message-versions.md; tests/shared/fracture/facts_on_the_wire.json holds every
version that was ever told): a new field has a default that says what was meant before; VERSION rises where an older
reader would read the message and be wrong; anything else is a new fact under a new name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, StringConstraints

from shared.fracture.protocol import Protocols

Id = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Fact(BaseModel):
    """What every fact is: frozen, by keyword only, without unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    VERSION: ClassVar[int] = 1
    """Of this fact's schema; it travels in the envelope."""


class SweepPlanned(Fact):
    """The series of a sweep are known and its plan is stored."""

    sweep_id: Id


class SweepClosed(Fact):
    """Nothing of a sweep is pending any more (or its runner gave up; the ledger says which)."""

    sweep_id: Id


class OfStudy(Fact):
    """A fact about a study, under the protocols (and the bundle) it is read with."""

    study_id: Id
    protocols: Protocols


class StudyRejected(OfStudy):
    """A study of which no series can be used; its plan holds the reasons."""


class ReportWritten(OfStudy):
    """A revision of a study's report lies in the store."""

    report_id: Id


class OfSeries(OfStudy):
    """A fact about one state (manifest) of a series."""

    series_id: Id
    manifest_id: Id


class SeriesStored(OfSeries):
    """A manifest is durable: the instances and masks known now, the volume beside it."""


class MasksReady(OfSeries):
    """The masks that this series is to be scored with are durable."""

    mask_hash: Id
    spine_hash: Id | None = None
    """Levels, heights and the gate's decisions under these masks (keys.spine); None where nobody measured them."""


class SeriesRejected(OfSeries):
    """A series was refused; the record holds the reasons."""


class SeriesDeadLettered(OfSeries):
    """A message about a series went to the dead letters; the record holds the reason."""


class OfCase(OfStudy):
    """A fact about one case: one vertebra of one series under one mask."""

    series_id: Id
    case_id: Id


class CaseReady(OfCase):
    """The crop of a case is durable and its guards let it pass."""


class FeaturesExtracted(OfCase):
    """The features of one kind are durable, or the case was decided before and needs them no more."""

    kind: Literal["hcr", "dtl"]


class FractureClassified(OfCase):
    """The result of a case is durable."""


class CaseNotEvaluated(OfCase):
    """A case was not scored by rule (guard, not fractured, review); the record holds the reason."""


class CaseRejected(OfCase):
    """A handler refused its input; the record holds the reason."""


class CaseDeadLettered(OfCase):
    """A message about a case went to the dead letters; the record holds the reason."""


FACTS: Mapping[str, type[Fact]] = {
    fact.__name__: fact
    for fact in (
        SweepPlanned,
        SweepClosed,
        StudyRejected,
        SeriesStored,
        MasksReady,
        SeriesRejected,
        SeriesDeadLettered,
        CaseReady,
        FeaturesExtracted,
        FractureClassified,
        CaseNotEvaluated,
        CaseRejected,
        CaseDeadLettered,
        ReportWritten,
    )
}
"""Every fact by its name on the wire."""
