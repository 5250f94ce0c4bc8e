from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from services.segmenter.segmentation import NO_SPINE, label_of
from services.segmenter.service import NO_MASK, build
from services.segmenter.settings import SegmenterSettings
from shared.fracture import keys
from shared.fracture.messages import MasksReady, SeriesStored
from shared.fracture.protocol import Protocols
from shared.fracture.records import Acquisition, Demographics, GridRecord, MaskRecord, SeriesManifest
from shared.fracture.spine.record import SpineRecord
from shared.fracture.volume import Mask, Volume, mask_from_nrrd, to_nrrd
from shared.pipeline.errors import FractureSweepError, Reject, Retry
from shared.pipeline.folder_store import FolderStore
from shared.pipeline.process_pool import ProcessPool
from shared.records.archive import read_record, write_record
from tests.fixtures.spine_network import HU_OF, SOUND, ct_of, lumbar, write_hu_network
from tests.fixtures.spines import DrawnBody

A, B, C, IMAGE, MASK = "a" * 64, "b" * 64, "c" * 64, "9" * 64, "d" * 64
PROTOCOLS = Protocols(crop_hash=A, hcr_hash=B, dtl_hash=C)
FACT = SeriesStored(study_id=A, series_id=B, manifest_id=C, protocols=PROTOCOLS)
LEVELS = ("T12", "L1", "L2", "L3", "L4", "L5")
WEDGED = DrawnBody(anterior=15, middle=20, posterior=26)
SPINE = (SOUND, SOUND, WEDGED, SOUND, SOUND, SOUND)


class Here(ProcessPool):
    """A pool whose jobs run here, and are counted."""

    def __init__(self) -> None:
        super().__init__(what="the segmentation", processes=1, seconds=60, memory_gib=0, jobs_per_process=1)
        self.jobs = 0

    def run(self, job: Any, *args: Any, **kwargs: Any) -> Any:
        self.jobs += 1
        return job(*args, **kwargs)


def manifest(**more: Any) -> SeriesManifest:
    known: dict[str, Any] = {
        "study_id": A,
        "series_id": B,
        "manifest_id": C,
        "image_hash": IMAGE,
        "instances": 40,
        "patient_id": A,
        "grid": grid_of(1.0),
        "acquisition": Acquisition(),
        "demographics": Demographics(age_years=70, sex="F"),
    }
    return SeriesManifest(**{**known, **more})


def grid_of(spacing: float) -> GridRecord:
    return GridRecord(
        shape_zyx=(40, 9, 9),
        spacing_zyx=(spacing, 0.5, 0.5),
        origin_zyx=(0, 0, 0),
        direction_zyx=((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    )


def stored(store: FolderStore, *, spacing: float = 1.0, mask_hash: str | None, faults: tuple[str, ...] = ()) -> None:
    told_of = manifest(grid=grid_of(spacing), mask_hash=mask_hash, mask_faults=faults)
    write_record(store, keys.manifest(B, C), told_of)


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "store")


@pytest.fixture(scope="session")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("network")
    write_hu_network(folder)
    return folder


@pytest.fixture
def pool() -> Here:
    return Here()


def told(store: FolderStore, pool: ProcessPool | None = None, **settings: Any) -> MasksReady:
    service = build(store=store, settings=SegmenterSettings(**{"source": "off", **settings}), pool=pool)
    (fact,) = service.handlers[SeriesStored](FACT)
    assert isinstance(fact, MasksReady)
    return fact


def spine_of(store: FolderStore, fact: MasksReady) -> SpineRecord:
    assert fact.spine_hash is not None
    return read_record(store, keys.spine(B, fact.spine_hash), SpineRecord)


def decisions(record: SpineRecord) -> Mapping[str, str]:
    return {finding.level: finding.decision for finding in record.findings}


# nobody makes masks ----------------------------------------------------------------------------------------------
def test_switched_off_a_series_with_masks_passes_as_it_came(store: FolderStore) -> None:
    stored(store, mask_hash=MASK)

    fact = told(store)

    assert fact == MasksReady(study_id=A, series_id=B, manifest_id=C, protocols=PROTOCOLS, mask_hash=MASK)
    assert "spine_hash" not in fact.model_fields_set  # an older resampler reads it


@pytest.mark.parametrize(
    ("spacing", "faults", "reasons"),
    [
        (1.0, (), (NO_MASK,)),
        (5.0, (), (NO_MASK, "slice spacing 5.0 mm is above 3.0 mm")),
        (3.0005, (), (NO_MASK,)),
        (1.0, ("the mask is empty",), ("the mask is empty",)),
    ],
)
def test_switched_off_a_series_without_masks_is_refused_with_all_that_stands_against_it(
    store: FolderStore, spacing: float, faults: tuple[str, ...], reasons: tuple[str, ...]
) -> None:
    stored(store, spacing=spacing, mask_hash=None, faults=faults)

    with pytest.raises(Reject) as refusal:
        told(store)

    assert refusal.value.reasons == reasons


# automatic masks -------------------------------------------------------------------------------------------------
def without_masks(store: FolderStore, scan: Volume, **more: Any) -> None:
    store.put(keys.volume(B, IMAGE), to_nrrd(scan))
    write_record(store, keys.manifest(B, C), manifest(**more))


@pytest.fixture(scope="module")
def scan() -> Volume:
    return ct_of(lumbar(bodies=SPINE), sacrum=True)


def test_a_series_without_masks_gets_them_with_levels_heights_and_decisions(
    store: FolderStore, scan: Volume, network: Path, pool: Here
) -> None:
    without_masks(store, scan)

    fact = told(store, pool, source="built-in", network=network, threads=1)

    masks = read_record(store, keys.mask_record(B, fact.mask_hash), MaskRecord)
    assert (masks.source, masks.roi_kind) == ("automatic", "body")
    assert masks.levels == {level: label_of(level) for level in LEVELS}
    labels = mask_from_nrrd(store.get(keys.mask(B, fact.mask_hash)))
    assert set(np.unique(labels.voxels).tolist()) == {0, *masks.levels.values()}
    record = spine_of(store, fact)
    assert record.gated
    assert record.segmenter.kind == "built-in"
    assert record.levels_from == "sacrum"
    assert decisions(record) == dict.fromkeys(LEVELS, "not-fractured") | {"L2": "fractured"}
    finding = record.finding("L2")
    assert finding is not None
    assert finding.loss is not None
    assert finding.loss.low <= finding.loss.value <= finding.loss.high
    assert finding.loss.value == pytest.approx(1 - 15 / 26, abs=0.1)
    assert finding.grade == 3
    assert "height loss" in finding.words


def test_the_whole_spine_is_drawn_from_the_side_and_from_the_front(
    store: FolderStore, scan: Volume, network: Path, pool: Here
) -> None:
    without_masks(store, scan)

    fact = told(store, pool, source="built-in", network=network, threads=1)

    for view in keys.SPINE_VIEWS:
        picture = Image.open(io.BytesIO(store.get(keys.spine_picture(B, fact.spine_hash or "", view))))
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1_000_000) or []}
        assert {(255, 82, 82), (102, 204, 128)} <= colours  # a fractured body, and sound ones
        assert min(picture.size) > 150


def test_a_series_told_twice_is_segmented_once(store: FolderStore, scan: Volume, network: Path, pool: Here) -> None:
    without_masks(store, scan)
    settings = {"source": "built-in", "network": network, "threads": 1}

    assert told(store, pool, **settings) == told(store, pool, **settings)
    assert pool.jobs == 1


def test_a_label_map_that_retention_dropped_is_made_again_to_the_same_bytes(
    store: FolderStore, scan: Volume, network: Path, pool: Here
) -> None:
    without_masks(store, scan)
    settings = {"source": "built-in", "network": network, "threads": 1}
    fact = told(store, pool, **settings)
    before = store.get(keys.mask(B, fact.mask_hash))
    store.delete(keys.mask(B, fact.mask_hash))

    assert told(store, pool, **settings) == fact
    assert store.get(keys.mask(B, fact.mask_hash)) == before


def test_another_network_other_limits_or_another_age_make_other_masks(
    store: FolderStore, scan: Volume, network: Path, pool: Here, tmp_path: Path
) -> None:
    write_hu_network(tmp_path / "other", version="2")
    without_masks(store, scan)
    base: dict[str, Any] = {"source": "built-in", "network": network, "threads": 1}
    hashes = [
        told(store, pool, **base).mask_hash,
        told(store, pool, **{**base, "network": tmp_path / "other"}).mask_hash,
        told(store, pool, **base, fractured_from=0.3).mask_hash,
    ]
    store.delete(keys.manifest(B, C))
    write_record(store, keys.manifest(B, C), manifest(demographics=Demographics(age_years=71, sex="F")))
    hashes.append(told(store, pool, **base).mask_hash)

    assert len(set(hashes)) == 4
    assert told(store, pool, **{**base, "threads": 2}).mask_hash == hashes[-1]  # what costs nothing decides nothing


def test_masks_that_came_and_cannot_be_used_are_named_beside_the_automatic_ones(
    store: FolderStore, scan: Volume, network: Path, pool: Here
) -> None:
    without_masks(store, scan, mask_faults=("the mask is empty",))

    fact = told(store, pool, source="built-in", network=network, threads=1)

    masks = read_record(store, keys.mask_record(B, fact.mask_hash), MaskRecord)
    assert "the mask is empty" in masks.warnings[0].sentence


def test_uncertain_levels_are_said_with_their_reason(store: FolderStore, network: Path, pool: Here) -> None:
    without_masks(store, ct_of(lumbar(bodies=SPINE)))

    fact = told(store, pool, source="built-in", network=network, threads=1)

    record = spine_of(store, fact)
    assert [finding.level for finding in record.findings] == ["B06", "B05", "B04", "B03", "B02", "B01"]
    assert "neither the sacrum" in record.doubts[0]
    masks = read_record(store, keys.mask_record(B, fact.mask_hash), MaskRecord)
    assert record.doubts[0] in {warning.sentence for warning in masks.warnings}


def test_a_scan_without_a_spine_is_refused_and_nothing_is_written(
    store: FolderStore, scan: Volume, network: Path, pool: Here
) -> None:
    empty = Volume(voxels=np.full(scan.voxels.shape, HU_OF["background"], dtype=np.int16), geometry=scan.geometry)
    without_masks(store, empty)

    with pytest.raises(Reject) as refusal:
        told(store, pool, source="built-in", network=network, threads=1)

    assert refusal.value.reasons == (NO_SPINE,)
    assert not list(store.keys("masks/"))


def test_slices_too_thick_to_see_bodies_in_are_refused_before_anything_is_computed(
    store: FolderStore, network: Path, pool: Here
) -> None:
    stored(store, spacing=7.0, mask_hash=None)

    with pytest.raises(Reject) as refusal:
        told(store, pool, source="built-in", network=network)

    assert refusal.value.reasons == ("slice spacing 7.0 mm is above 6.0 mm",)
    assert pool.jobs == 0


def test_slices_too_thick_for_heights_show_named_bodies_that_are_not_judged(
    store: FolderStore, network: Path, pool: Here
) -> None:
    scan = ct_of(lumbar(bodies=SPINE, spacing_zyx=(5.0, 1.5, 1.5)), sacrum=True)
    without_masks(store, scan, grid=grid_of(5.0))

    record = spine_of(store, told(store, pool, source="built-in", network=network, threads=1))

    assert [one.level for one in record.findings] == list(LEVELS)
    assert {one.decision for one in record.findings} == {"not-evaluable"}
    assert any("heights are not read from steps of" in one.reason for one in record.findings)


def test_cement_in_a_body_keeps_its_heights_from_being_judged(store: FolderStore, network: Path, pool: Here) -> None:
    spine = lumbar(bodies=SPINE)
    scan = ct_of(spine, sacrum=True)
    k, j, i = np.rint(spine.frames[2].centre_zyx / 1.5).astype(int)
    scan.voxels[k - 1 : k + 2, j - 2 : j + 2, i - 2 : i + 2] = 2600  # in the middle, so its outline stays
    without_masks(store, scan)

    record = spine_of(store, told(store, pool, source="built-in", network=network, threads=1))

    finding = record.finding("L2")
    assert finding is not None
    assert (finding.decision, finding.reason) == ("not-evaluable", "metal or cement in the body: more than 2000 HU")


def test_a_network_that_cannot_be_used_is_said_when_the_worker_starts(store: FolderStore) -> None:
    with pytest.raises(FractureSweepError, match=r"segmenter\.network: nowhere holds no network\.json"):
        build(store=store, settings=SegmenterSettings(source="built-in", network=Path("nowhere")))


# given masks -----------------------------------------------------------------------------------------------------
def with_masks(store: FolderStore, scan: Volume, *, whole: bool = False, body_mask: bool = False) -> None:
    spine = lumbar(bodies=SPINE)
    voxels = spine.whole if whole else spine.bodies
    table = np.array([0, *[label_of(level) for level in LEVELS]], dtype=np.uint8)
    store.put(keys.volume(B, IMAGE), to_nrrd(scan))
    store.put(keys.mask(B, MASK), to_nrrd(Mask(voxels=table[voxels], geometry=scan.geometry)))
    if body_mask:
        bodies = Mask(voxels=(spine.bodies > 0).astype(np.uint8), geometry=scan.geometry)
        store.put(keys.body_mask(B, MASK), to_nrrd(bodies))
    record = MaskRecord(
        series_id=B,
        mask_hash=MASK,
        source="nifti",
        roi_kind="vertebra" if whole else "body",
        has_body_mask=body_mask,
        levels={level: label_of(level) for level in LEVELS},
    )
    write_record(store, keys.mask_record(B, MASK), record)
    write_record(store, keys.manifest(B, C), manifest(mask_hash=MASK))


@pytest.mark.parametrize(("whole", "body_mask"), [(False, False), (True, False), (True, True)])
def test_given_masks_are_measured_and_kept(
    store: FolderStore, scan: Volume, network: Path, pool: Here, whole: bool, body_mask: bool
) -> None:
    with_masks(store, scan, whole=whole, body_mask=body_mask)

    fact = told(store, pool, source="built-in", network=network)

    assert fact.mask_hash == MASK
    record = spine_of(store, fact)
    assert not record.gated
    assert record.segmenter.kind == "given"
    assert record.levels_from == "mask"
    assert decisions(record) == dict.fromkeys(LEVELS, "not-fractured") | {"L2": "fractured"}
    assert set(keys.SPINE_VIEWS) == {
        view for view in keys.SPINE_VIEWS if store.exists(keys.spine_picture(B, fact.spine_hash or "", view))
    }


def test_gate_all_gates_given_masks_under_a_name_of_their_own(
    store: FolderStore, scan: Volume, network: Path, pool: Here
) -> None:
    with_masks(store, scan, whole=True, body_mask=True)

    fact = told(store, pool, source="built-in", network=network, gate="all")

    assert fact.mask_hash != MASK
    assert spine_of(store, fact).gated
    copied = read_record(store, keys.mask_record(B, fact.mask_hash), MaskRecord)
    original = read_record(store, keys.mask_record(B, MASK), MaskRecord)
    assert copied == original.model_copy(update={"mask_hash": fact.mask_hash})
    assert store.get(keys.mask(B, fact.mask_hash)) == store.get(keys.mask(B, MASK))
    assert store.get(keys.body_mask(B, fact.mask_hash)) == store.get(keys.body_mask(B, MASK))
    assert told(store, pool, source="built-in", network=network, gate="all") == fact
    assert pool.jobs == 1


def test_a_mask_without_a_level_that_could_be_measured_passes(store: FolderStore, network: Path, pool: Here) -> None:
    record = MaskRecord(
        series_id=B, mask_hash=MASK, source="nifti", roi_kind="body", levels={}, refused={"L1": "two masks for L1"}
    )
    write_record(store, keys.mask_record(B, MASK), record)
    stored(store, mask_hash=MASK)

    assert told(store, pool, source="built-in", network=network).spine_hash is None
    assert pool.jobs == 0


def test_a_volume_that_retention_dropped_is_waited_for(
    store: FolderStore, scan: Volume, network: Path, pool: Here
) -> None:
    with_masks(store, scan)
    store.delete(keys.volume(B, IMAGE))

    with pytest.raises(Retry, match="retention dropped it"):
        told(store, pool, source="built-in", network=network)


def test_a_mask_on_another_grid_is_refused(store: FolderStore, scan: Volume, network: Path, pool: Here) -> None:
    with_masks(store, scan)
    store.delete(keys.mask(B, MASK))
    other = Mask(
        voxels=np.zeros((5, 5, 5), dtype=np.uint8),
        geometry=ct_of(lumbar()).geometry.__class__(
            shape_zyx=(5, 5, 5),
            spacing_zyx=(1, 1, 1),
            origin_zyx=(0, 0, 0),
            direction_zyx=((1, 0, 0), (0, 1, 0), (0, 0, 1)),
        ),
    )
    store.put(keys.mask(B, MASK), to_nrrd(other))

    with pytest.raises(Reject, match="another grid"):
        told(store, pool, source="built-in", network=network)


def test_it_runs_in_a_process_of_its_own(store: FolderStore, scan: Volume, network: Path) -> None:
    without_masks(store, scan)
    service = build(store=store, settings=SegmenterSettings(source="built-in", network=network, threads=1))
    try:
        (fact,) = service.handlers[SeriesStored](FACT)
    finally:
        service.close()

    assert decisions(spine_of(store, fact))["L2"] == "fractured"
