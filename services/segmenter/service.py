"""Holds the segmenter's place: a series with masks passes, one without is refused with all that stands against it.

The message exists from the start, so that automatic masks come in here without a change to any neighbour.
"""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import BaseModel

from shared.fracture import keys
from shared.fracture.messages import FACTS, MasksReady, SeriesStored
from shared.fracture.records import SeriesManifest
from shared.fracture.topology import SEGMENTER
from shared.pipeline.errors import Reject
from shared.pipeline.service import Service
from shared.pipeline.store import Store
from shared.records.archive import read_record
from shared.records.outcomes import rejecting

NO_MASK = "no vertebra mask came with the series"


def refusals(manifest: SeriesManifest, *, max_slice_spacing_mm: float, tolerance_mm: float) -> tuple[str, ...]:
    """Why a series without masks cannot be scored, the leading reason first."""
    coarsest = max(manifest.grid.spacing_zyx)
    spacing = (
        (f"slice spacing {coarsest:.1f} mm is above {max_slice_spacing_mm:.1f} mm",)
        if coarsest > max_slice_spacing_mm + tolerance_mm
        else ()
    )
    return (*(manifest.mask_faults or (NO_MASK,)), *spacing)


def build(*, store: Store, max_slice_spacing_mm: float = 3.0, tolerance_mm: float = 1e-3) -> Service:
    """The segmenter over a store; the spacing limit is the resampler's own (a reason beside the missing mask)."""

    def series_stored(fact: BaseModel) -> Iterable[BaseModel]:
        assert isinstance(fact, SeriesStored)  # noqa: S101 - the worker hands a handler its own type alone
        manifest = read_record(store, keys.manifest(fact.series_id, fact.manifest_id), SeriesManifest)
        if manifest.mask_hash is None:
            raise Reject(*refusals(manifest, max_slice_spacing_mm=max_slice_spacing_mm, tolerance_mm=tolerance_mm))
        yield MasksReady(
            study_id=fact.study_id,
            series_id=fact.series_id,
            manifest_id=fact.manifest_id,
            protocols=fact.protocols,
            mask_hash=manifest.mask_hash,
        )

    return Service(
        name=SEGMENTER,
        queues=(SEGMENTER,),
        messages=FACTS,
        handlers={SeriesStored: series_stored},
        rejected=rejecting(store, SEGMENTER),
    )
