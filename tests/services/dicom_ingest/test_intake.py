from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.dicom_ingest.collected import CollectedMask, CollectedSeries, CollectedSlice, PatientIdentity
from services.dicom_ingest.intake import (
    LIST_DROPPED,
    NOT_JOINED,
    OTHER_IMAGES,
    VOLUME_DROPPED,
    Intake,
    StoredStudy,
)
from services.dicom_ingest.sweep import (
    CollectedFile,
    CollectedStudy,
    NoSource,
    close_sweep,
    file_counts,
    run_sweep,
)
from shared.fracture import keys
from shared.fracture.ids import Pseudonyms
from shared.fracture.messages import Fact, SeriesRejected, SeriesStored, StudyRejected, SweepClosed, SweepPlanned
from shared.fracture.protocol import Protocols
from shared.fracture.records import Demographics, MaskRecord, SeriesManifest, StudyPlan, SweepClosing
from shared.fracture.volume import Geometry, Mask, Volume, mask_from_nrrd, volume_from_nrrd
from shared.pipeline.errors import BrokerUnavailable
from shared.pipeline.folder_store import FolderStore
from shared.records.archive import newest, read_record, revisions
from shared.records.ledger import is_open, sweep_ledger

PROTOCOLS = Protocols(crop_hash="a" * 64, hcr_hash="b" * 64, dtl_hash="c" * 64, bundle_id="d" * 64)
WHO = PatientIdentity(patient_name="SENTINEL^NAME", patient_id="SENTINEL-ID", study_instance_uid="1.2.99.1")
PLANES = np.random.default_rng(0).integers(-1000, 1000, (40, 6, 5)).astype(np.int16)


def series(first: int = 0, last: int = 10, *, mask: bool = True, age: int | None = 71) -> CollectedSeries:
    geometry = Geometry(
        shape_zyx=(last - first, 6, 5),
        spacing_zyx=(1.25, 0.5, 0.5),
        origin_zyx=(1.25 * first - 100, 7.0, 9.0),
        direction_zyx=((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
    )
    labels = np.zeros(geometry.shape_zyx, dtype=np.uint8)
    labels[2:5, 1:4, 1:4] = 20
    return CollectedSeries(
        series_instance_uid="1.2.99.1.1",
        modality="CT",
        instances=last - first,
        volume=Volume(voxels=PLANES[first:last], geometry=geometry),
        slices=tuple(
            CollectedSlice(sop_instance_uid=f"1.2.99.1.1.{n}", sop_class_uid="ct", position_mm=1.25 * n - 100)
            for n in range(first, last)
        ),
        demographics=Demographics(age_years=age, sex="F"),
        mask=CollectedMask(
            source="dicom-seg", roi_kind="body", labels=Mask(voxels=labels, geometry=geometry), levels={"L1": 20}
        )
        if mask
        else None,
    )


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "store")


def intake(store: FolderStore, **judged_by: object) -> Intake:
    return Intake(store=store, pseudonyms=Pseudonyms(bytes(32)), protocols=PROTOCOLS, judged_by=judged_by)


def manifest_of(store: FolderStore, stored: StoredStudy) -> SeriesManifest:
    line = stored.series[0]
    return read_record(store, keys.manifest(line.series_id, line.manifest_id), SeriesManifest)


def test_a_series_is_durable_before_it_is_told(store: FolderStore) -> None:
    stored = intake(store).store_study(WHO, [series()])

    manifest = manifest_of(store, stored)
    volume = volume_from_nrrd(store.get(keys.volume(manifest.series_id, manifest.image_hash)))
    assert [type(fact) for fact in stored.facts] == [SeriesStored]
    assert np.array_equal(volume.voxels, PLANES[:10])
    assert manifest.mask_hash is not None
    mask = read_record(store, keys.mask_record(manifest.series_id, manifest.mask_hash), MaskRecord)
    assert mask.levels == {"L1": 20}


def test_the_same_delivery_twice_stores_nothing_and_tells_the_same(store: FolderStore) -> None:
    first = intake(store).store_study(WHO, [series()])
    before = list(store.keys(""))

    second = intake(store).store_study(WHO, [series()])

    assert (first.new, second.new) == (True, False)
    assert second.facts == first.facts
    assert list(store.keys("")) == before


def test_one_more_slice_supersedes(store: FolderStore) -> None:
    first = intake(store).store_study(WHO, [series(0, 10)])
    second = intake(store).store_study(WHO, [series(0, 11)])

    plans = revisions(store, keys.study_plans(first.study_id), StudyPlan)
    assert [(p.revision, p.supersedes) for p in plans] == [(1, None), (2, 1)]
    assert manifest_of(store, second).instances == 11


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 9), st.integers(1, 10))
def test_a_subset_sent_again_supersedes_nothing(tmp_path_factory: pytest.TempPathFactory, a: int, n: int) -> None:
    store = FolderStore(tmp_path_factory.mktemp("subset"))
    whole = intake(store).store_study(WHO, [series(0, 20)])

    subset = intake(store).store_study(WHO, [series(a, a + n, mask=False)])

    assert not subset.new
    assert subset.facts == whole.facts


@settings(max_examples=20, deadline=None)
@given(st.integers(3, 25), st.integers(0, 20))
def test_late_slices_join_those_that_are_durable(
    tmp_path_factory: pytest.TempPathFactory, cut: int, overlap: int
) -> None:
    store = FolderStore(tmp_path_factory.mktemp("late"))
    intake(store).store_study(WHO, [series(0, cut, mask=False)])

    late = intake(store).store_study(WHO, [series(max(cut - overlap, 0), 40, mask=False)])

    manifest = manifest_of(store, late)
    volume = volume_from_nrrd(store.get(keys.volume(manifest.series_id, manifest.image_hash)))
    assert np.array_equal(volume.voxels, PLANES)
    assert volume.geometry.same_grid(series(0, 40).volume.geometry)  # type: ignore[union-attr]


def test_the_mask_of_late_slices_lies_where_it_lay(store: FolderStore) -> None:
    intake(store).store_study(WHO, [series(0, 12, mask=False)])

    late = intake(store).store_study(WHO, [series(10, 40)])

    manifest = manifest_of(store, late)
    labels = mask_from_nrrd(store.get(keys.mask(manifest.series_id, manifest.mask_hash or "")))
    assert sorted(set(np.argwhere(labels.voxels == 20)[:, 0].tolist())) == [12, 13, 14]


def test_late_slices_with_a_gap_before_them_are_refused_with_the_reason(store: FolderStore) -> None:
    intake(store).store_study(WHO, [series(0, 12, mask=False)])

    late = intake(store).store_study(WHO, [series(15, 40, mask=False)])

    assert [type(fact) for fact in late.facts] == [SeriesRejected, StudyRejected]


def test_a_late_image_that_cannot_be_joined_takes_no_result_back_and_is_named(store: FolderStore) -> None:
    whole = intake(store).store_study(WHO, [series(0, 20)])
    late = replace(series(20, 21, mask=False), volume=None, reasons=("1 image makes no volume",), files=("late",))

    class Source:
        total = 1

        def studies(self) -> Iterator[CollectedStudy]:
            yield CollectedStudy(identity=WHO, series=[late])

        def files(self) -> tuple[CollectedFile, ...]:
            return (CollectedFile(path="late", role="image"),)

    plan = run_sweep(
        Source(),
        name="late",
        sweep_id="c" * 64,
        intake=intake(store),
        store=store,
        protocols=PROTOCOLS,
        tell=[].append,
    )

    assert [s.manifest_id for s in plan.series] == [s.manifest_id for s in whole.series]
    ((reason, count),) = plan.files.ignored.items()
    assert count == 1
    assert reason.startswith(NOT_JOINED)
    assert "1 image makes no volume" in reason


def test_a_mask_that_comes_later_is_a_new_state_and_goes_no_more(store: FolderStore) -> None:
    without = intake(store).store_study(WHO, [series(mask=False)])
    with_mask = intake(store).store_study(WHO, [series()])
    again = intake(store).store_study(WHO, [series(mask=False)])

    assert without.series != with_mask.series
    assert again.series == with_mask.series


def test_a_corrected_age_is_a_new_state_with_new_cases(store: FolderStore) -> None:
    one = manifest_of(store, intake(store).store_study(WHO, [series(age=71)]))
    other = manifest_of(store, intake(store).store_study(WHO, [series(age=17)]))

    assert one.mask_hash != other.mask_hash
    assert one.manifest_id != other.manifest_id


def test_a_refused_series_is_planned_with_its_reasons(store: FolderStore) -> None:
    refused = replace(series(), volume=None, reasons=("2 slices are missing",))

    stored = intake(store).store_study(WHO, [refused])

    assert [type(fact) for fact in stored.facts] == [SeriesRejected, StudyRejected]
    plan = newest(store, keys.study_plans(stored.study_id), StudyPlan)
    assert plan is not None
    assert plan.series[0].rejected


def test_other_settings_judge_a_refused_series_anew(store: FolderStore) -> None:
    refused = replace(series(), volume=None, reasons=("2 slices are missing",))
    one = intake(store, tolerance=1).store_study(WHO, [refused])
    other = intake(store, tolerance=2).store_study(WHO, [series()])

    assert one.series != other.series
    assert isinstance(other.facts[0], SeriesStored)


def test_no_identifier_leaves_the_restricted_prefixes(store: FolderStore) -> None:
    intake(store).store_study(WHO, [series()])

    for key in store.keys(""):
        data = store.get(key)
        if not key.startswith(keys.RESTRICTED):
            assert b"SENTINEL" not in data
            assert b"1.2.99.1" not in data
    assert "SENTINEL" not in "".join(store.keys(""))


class FakeSource:
    total = 1

    def studies(self) -> Iterator[CollectedStudy]:
        yield CollectedStudy(identity=WHO, series=[series()])

    def files(self) -> tuple[CollectedFile, ...]:
        return (
            CollectedFile(path="a", role="image"),
            CollectedFile(path="b", role="ignored", reason="not DICOM"),
        )


def sweep(store: FolderStore, told: list[Fact]) -> str:
    sweep_id = "e" * 64
    run_sweep(
        FakeSource(),
        name="a sweep",
        sweep_id=sweep_id,
        intake=intake(store),
        store=store,
        protocols=PROTOCOLS,
        tell=told.append,
    )
    return sweep_id


def test_a_sweep_keeps_three_ledgers(store: FolderStore) -> None:
    told: list[Fact] = []

    ledger = sweep_ledger(store, sweep(store, told))

    assert ledger is not None
    assert ledger.exact
    assert ledger.files.ignored == {"not DICOM": 1}
    assert ledger.series.by_state["pending"] == 1
    assert isinstance(told[-1], SweepPlanned)


def test_a_sweep_run_twice_has_one_plan(store: FolderStore) -> None:
    sweep_id = sweep(store, [])
    sweep(store, [])

    assert len(list(store.keys(keys.sweep_plans(sweep_id)))) == 1


def test_a_sweep_with_something_pending_is_not_closed(store: FolderStore) -> None:
    told: list[Fact] = []
    sweep_id = sweep(store, told)

    assert close_sweep(store, sweep_id, tell=told.append) is None
    assert is_open(store, sweep_id)


def test_a_sweep_stays_open_until_its_closing_was_told(store: FolderStore) -> None:
    sweep_id = "f" * 64
    run_sweep(
        NoSource(["notes.txt"], "not a DICOM file"),
        name="a sweep",
        sweep_id=sweep_id,
        intake=intake(store),
        store=store,
        protocols=PROTOCOLS,
        tell=[].append,
    )

    def unheard(fact: Fact) -> None:
        raise BrokerUnavailable("nobody confirmed")

    with pytest.raises(BrokerUnavailable):
        close_sweep(store, sweep_id, tell=unheard)
    open_after_the_first = is_open(store, sweep_id)
    told: list[Fact] = []
    closing = close_sweep(store, sweep_id, tell=told.append)

    assert open_after_the_first
    assert told == [SweepClosed(sweep_id=sweep_id)]
    assert closing is not None
    assert closing.revision == 1
    assert not is_open(store, sweep_id)


def test_a_submission_that_cannot_be_read_stands_in_the_ledger_of_files(store: FolderStore) -> None:
    sweep_id = "f" * 64
    run_sweep(
        NoSource(["pairs.csv", "ct.nii.gz"], "the submission cannot be read"),
        name="a sweep",
        sweep_id=sweep_id,
        intake=intake(store),
        store=store,
        protocols=PROTOCOLS,
        tell=[].append,
    )

    ledger = sweep_ledger(store, sweep_id)

    assert ledger is not None
    assert ledger.exact
    assert ledger.files.ignored == {"the submission cannot be read": 2}
    assert close_sweep(store, sweep_id, tell=[].append) is not None


def test_file_counts_add_up() -> None:
    counts = file_counts(FakeSource().files())

    assert (counts.found, counts.in_series, counts.ignored) == (2, 1, {"not DICOM": 1})


def drop(store: FolderStore, *prefixes: str) -> dict[str, bytes]:
    """What retention drops: the volumes and label maps (or all under other prefixes); returns what was there."""
    gone = {
        key: store.get(key) for key in store.keys("") if key.endswith(".nrrd") or key.startswith(prefixes or ("-",))
    }
    for key in gone:
        store.delete(key)
    return gone


def test_a_dropped_volume_and_its_masks_are_written_again_to_the_last_byte(store: FolderStore) -> None:
    first = intake(store).store_study(WHO, [series()])
    gone = drop(store)

    again = intake(store).store_study(WHO, [series()])

    assert len(gone) == 2
    assert {key: store.get(key) for key in gone} == gone
    assert (again.facts, again.new, again.unjoined) == (first.facts, False, {})


def test_a_volume_that_was_joined_late_is_made_again_to_the_last_byte_from_the_whole(store: FolderStore) -> None:
    intake(store).store_study(WHO, [series(0, 12, mask=False)])
    intake(store).store_study(WHO, [series(10, 40, mask=False)])
    gone = drop(store)

    intake(store).store_study(WHO, [series(0, 40, mask=False)])

    newest_volume = max(gone, key=lambda key: len(gone[key]))
    assert store.get(newest_volume) == gone[newest_volume]


def test_a_dropped_volume_comes_back_with_a_delivery_without_masks_too(store: FolderStore) -> None:
    first = intake(store).store_study(WHO, [series()])
    gone = drop(store)

    again = intake(store).store_study(WHO, [series(mask=False)])

    assert [key for key in gone if store.exists(key)] == [key for key in gone if key.startswith("volumes/")]
    assert again.facts == first.facts


def test_late_slices_do_not_shrink_a_series_whose_volume_was_dropped(store: FolderStore) -> None:
    whole = intake(store).store_study(WHO, [series(0, 20)])
    drop(store)

    late = intake(store).store_study(WHO, [series(18, 24, mask=False)])

    assert late.series == whole.series
    assert list(late.unjoined.values()) == [f"{NOT_JOINED}: {VOLUME_DROPPED}"]
    assert not [key for key in store.keys("volumes/") if key.endswith(".nrrd")]


def test_a_subset_of_a_dropped_volume_supersedes_nothing_and_is_no_fault(store: FolderStore) -> None:
    whole = intake(store).store_study(WHO, [series(0, 20)])
    drop(store)

    subset = intake(store).store_study(WHO, [series(3, 9, mask=False)])

    assert (subset.facts, subset.new, subset.unjoined) == (whole.facts, False, {})


def test_the_whole_series_with_late_slices_joins_what_was_dropped(store: FolderStore) -> None:
    intake(store).store_study(WHO, [series(0, 20)])
    drop(store)

    late = intake(store).store_study(WHO, [series(0, 24)])

    assert (manifest_of(store, late).instances, late.unjoined) == (24, {})


@pytest.mark.parametrize(("first", "last", "joined"), [(0, 20, True), (0, 24, True), (3, 24, False), (3, 9, False)])
def test_without_the_list_of_its_images_a_series_does_not_shrink(
    store: FolderStore, first: int, last: int, joined: bool
) -> None:
    whole = intake(store).store_study(WHO, [series(0, 20)])
    drop(store, "identities/")

    again = intake(store).store_study(WHO, [series(first, last)])

    assert list(again.unjoined.values()) == ([] if joined else [f"{NOT_JOINED}: {LIST_DROPPED}"])
    assert manifest_of(store, again).instances == (last if joined else manifest_of(store, whole).instances)


def test_identities_that_were_dropped_come_back_when_the_study_is_swept_again(store: FolderStore) -> None:
    intake(store).store_study(WHO, [series()])
    before = list(store.keys("identities/"))
    drop(store, "identities/")

    intake(store).store_study(WHO, [series()])

    assert list(store.keys("identities/")) == before


def test_other_voxels_under_the_same_uids_do_not_take_the_place_of_a_dropped_volume(store: FolderStore) -> None:
    whole = intake(store).store_study(WHO, [series()])
    drop(store)
    changed = series()
    assert changed.volume is not None
    changed = replace(changed, volume=replace(changed.volume, voxels=changed.volume.voxels + np.int16(1)))

    again = intake(store).store_study(WHO, [changed])

    assert again.series == whole.series
    assert list(again.unjoined.values()) == [OTHER_IMAGES]
    assert not store.exists(keys.volume(whole.series[0].series_id, manifest_of(store, whole).image_hash))


def test_a_sweep_under_another_bundle_is_open_before_its_first_fact(store: FolderStore) -> None:
    sweep_id = sweep(store, [])
    open_then: list[bool] = []
    closing = SweepClosing(sweep_id=sweep_id, revision=1, closed_at=datetime.now(UTC), pending=0)
    store.put(keys.revision(keys.sweep_closed(sweep_id), 1), closing.to_bytes())
    store.put(keys.sweep_closing_told(sweep_id, 1), b"")
    assert not is_open(store, sweep_id)

    run_sweep(
        FakeSource(),
        name="a sweep",
        sweep_id=sweep_id,
        intake=intake(store),
        store=store,
        protocols=PROTOCOLS.model_copy(update={"bundle_id": "9" * 64}),
        tell=lambda fact: open_then.append(is_open(store, sweep_id)),
    )

    assert open_then == [True, True]


def test_a_study_is_marked_before_anything_of_it_is_stored(store: FolderStore) -> None:
    marks: list[list[str]] = []

    class Source(FakeSource):
        def studies(self) -> Iterator[CollectedStudy]:
            def one() -> Iterator[CollectedSeries]:
                marks.append(list(store.keys(keys.SWEEPS_OF_STUDY)))
                yield series()

            yield CollectedStudy(identity=WHO, series=one())

    run_sweep(
        Source(),
        name="a sweep",
        sweep_id="e" * 64,
        intake=intake(store),
        store=store,
        protocols=PROTOCOLS,
        tell=[].append,
    )

    assert marks == [[keys.sweep_of_study(intake(store).study_id(WHO), "e" * 64)]]
