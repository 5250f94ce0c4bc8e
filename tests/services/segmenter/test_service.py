from __future__ import annotations

from pathlib import Path

import pytest

from services.segmenter.service import NO_MASK, build
from shared.fracture import keys
from shared.fracture.messages import MasksReady, SeriesStored
from shared.fracture.protocol import Protocols
from shared.fracture.records import Acquisition, Demographics, GridRecord, SeriesManifest
from shared.pipeline.errors import Reject
from shared.pipeline.folder_store import FolderStore
from shared.records.archive import write_record

A, B, C = "a" * 64, "b" * 64, "c" * 64
PROTOCOLS = Protocols(crop_hash=A, hcr_hash=B, dtl_hash=C)
FACT = SeriesStored(study_id=A, series_id=B, manifest_id=C, protocols=PROTOCOLS)


def stored(store: FolderStore, *, spacing: float = 1.0, mask_hash: str | None, faults: tuple[str, ...] = ()) -> None:
    manifest = SeriesManifest(
        study_id=A,
        series_id=B,
        manifest_id=C,
        image_hash=A,
        instances=40,
        patient_id=A,
        grid=GridRecord(
            shape_zyx=(40, 9, 9),
            spacing_zyx=(spacing, 0.5, 0.5),
            origin_zyx=(0, 0, 0),
            direction_zyx=((1, 0, 0), (0, 1, 0), (0, 0, 1)),
        ),
        acquisition=Acquisition(),
        demographics=Demographics(),
        mask_hash=mask_hash,
        mask_faults=faults,
    )
    write_record(store, keys.manifest(B, C), manifest)


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "store")


def test_a_series_with_masks_passes_through(store: FolderStore) -> None:
    stored(store, mask_hash="d" * 64)

    facts = list(build(store=store).handlers[SeriesStored](FACT))

    assert facts == [MasksReady(study_id=A, series_id=B, manifest_id=C, protocols=PROTOCOLS, mask_hash="d" * 64)]


@pytest.mark.parametrize(
    ("spacing", "faults", "reasons"),
    [
        (1.0, (), (NO_MASK,)),
        (5.0, (), (NO_MASK, "slice spacing 5.0 mm is above 3.0 mm")),
        (3.0005, (), (NO_MASK,)),
        (1.0, ("the mask is empty",), ("the mask is empty",)),
    ],
)
def test_a_series_without_masks_is_refused_with_all_that_stands_against_it(
    store: FolderStore, spacing: float, faults: tuple[str, ...], reasons: tuple[str, ...]
) -> None:
    stored(store, spacing=spacing, mask_hash=None, faults=faults)

    with pytest.raises(Reject) as refusal:
        list(build(store=store).handlers[SeriesStored](FACT))

    assert refusal.value.reasons == reasons
