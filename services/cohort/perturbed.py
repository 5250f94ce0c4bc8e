"""Repeats without a second reader: the features of perturbed masks of some training rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from services.cohort.assembly import Cohort
from services.cohort.protocols import Extraction
from services.cohort.rows import (
    Progress,
)
from services.settings import Settings
from services.trainer.cohort_table import Repeat
from services.trainer.perturbation import VERSION as PERTURBATION_VERSION
from services.trainer.perturbation import draw, perturbed, perturbed_rows
from services.trainer.settings import TrainingSettings
from shared.fracture import keys
from shared.fracture.features import FeatureVector
from shared.fracture.ids import digest
from shared.fracture.volume import mask_from_nrrd, to_nrrd, volume_from_nrrd
from shared.pipeline.errors import OverBudget, Retry
from shared.pipeline.store import Store
from shared.records.archive import crop_files

if TYPE_CHECKING:
    from services.radiomics_extractor.process_pool import ExtractionPool


def with_perturbed(
    cohort: Cohort,
    training: NDArray[np.bool_],
    *,
    settings: TrainingSettings,
    app: Settings,
    store: Store,
    progress: Progress,
) -> Cohort:
    """The cohort with the features of perturbed masks of some training rows, as repeats of the kind intra."""
    from services.radiomics_extractor.process_pool import ExtractionPool

    table = cohort.table
    rows = perturbed_rows(table.patient, training, count=settings.repeatability.perturbed_cases, seed=settings.seed)
    kept: list[int] = []
    values: list[NDArray[np.float64]] = []
    lost: Counter[str] = Counter()
    with ExtractionPool(parameters=cohort.extraction.parameters, settings=app.radiomics_extractor) as pool:

        def one(row: int) -> NDArray[np.float64] | str:
            return _perturbed_features(
                table.case_id[row],
                store=store,
                extraction=cohort.extraction,
                names=table.hcr_names,
                seed=settings.seed,
                pool=pool,
            )

        for done, (row, result) in enumerate(_in_threads(one, rows, count=pool.processes), start=1):
            progress("perturbed masks", done, len(rows))
            if isinstance(result, str):
                lost[result] += 1
            else:
                kept.append(row)
                values.append(result)
    order = np.argsort(kept, kind="stable")
    repeat = Repeat(
        rows=np.array(kept, dtype=np.int64)[order],
        hcr=np.array(values, dtype=np.float64).reshape(len(kept), len(table.hcr_names))[order],
    )
    warnings = tuple(f"{count} perturbed cases were left out: {reason}" for reason, count in sorted(lost.items()))
    return replace(
        cohort,
        table=replace(table, repeats={"intra": repeat}, perturbed=True),
        warnings=(*cohort.warnings, *warnings),
    )


def _perturbed_features(
    case_id: str, *, store: Store, extraction: Extraction, names: tuple[str, ...], seed: int, pool: ExtractionPool
) -> NDArray[np.float64] | str:
    """Features of a case's perturbed crop, kept under an id of their own; or why there are none."""
    from services.radiomics_extractor.extraction import ExtractionError

    own = digest({"perturbed": case_id, "seed": seed, "version": PERTURBATION_VERSION})
    hcr = extraction.hcr
    key = keys.hcr_features(hcr.hcr_hash, own)
    if not store.exists(key):
        image, mask = crop_files(store, extraction.crop.crop_hash, case_id)
        change = draw(np.random.default_rng([seed, int(case_id[:15], 16)]))
        try:
            changed = perturbed(
                volume_from_nrrd(image),
                mask_from_nrrd(mask),
                change,
                window_hu=extraction.crop.window_hu,
            )
            features = pool.extract(image=to_nrrd(changed[0]), mask=to_nrrd(changed[1]))
        except (ExtractionError, OverBudget, Retry, ValueError) as error:
            return str(error)
        if tuple(features) != names:
            return "pyradiomics gave another list of features"
        vector = FeatureVector(
            kind="hcr",
            names=names,
            values=np.array(list(features.values()), dtype=np.float64),
            protocol_hash=hcr.hcr_hash,
            provenance={"perturbed": str(PERTURBATION_VERSION)},
        )
        store.put(key, vector.to_bytes())
    return FeatureVector.from_bytes(store.get(key)).values


def _in_threads(
    one: Callable[[int], NDArray[np.float64] | str], rows: Sequence[int], *, count: int
) -> Iterator[tuple[int, NDArray[np.float64] | str]]:
    """Results as they come, at most `count` under way."""
    with ThreadPoolExecutor(max_workers=count) as threads:
        futures = {threads.submit(one, row): row for row in rows}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise
