import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk

from services.resampler.regions import region_of
from services.resampler.service import NOT_MEASURED, no_case_reasons, planned_cases, resampler_service
from services.resampler.settings import ResamplerSettings
from shared.fracture import keys
from shared.fracture.crop import crop_vertebra
from shared.fracture.levels import TOTALSEG
from shared.fracture.messages import CaseNotEvaluated, CaseReady, CaseRejected, MasksReady
from shared.fracture.protocol import CropProtocol, Protocols
from shared.fracture.records import (
    Acquisition,
    CaseRecord,
    Demographics,
    GridRecord,
    MaskRecord,
    NotEvaluated,
    Rejection,
    SeriesManifest,
    SeriesPlan,
    Warned,
)
from shared.fracture.spine.gate import GateSettings
from shared.fracture.spine.record import Banded, Finding, SegmenterNote, SpineRecord
from shared.fracture.volume import (
    Geometry,
    Mask,
    Volume,
    mask_from_nrrd,
    mask_from_sitk,
    to_nrrd,
    volume_from_nrrd,
    volume_from_sitk,
)
from shared.pipeline.errors import OverBudget, Reject, Retry
from shared.pipeline.folder_store import FolderStore
from shared.pipeline.process_pool import ProcessPool
from shared.records.archive import read_record, revisions

STUDY, SERIES, IMAGE, PATIENT = "1" * 64, "2" * 64, "3" * 64, "4" * 64
PROTOCOL = CropProtocol()
PROTOCOLS = Protocols(crop_hash=PROTOCOL.crop_hash, hcr_hash="a" * 64, dtl_hash="b" * 64, bundle_id="c" * 64)
GEOMETRY = Geometry(
    shape_zyx=(100, 60, 60),
    spacing_zyx=(1.0, 1.0, 1.0),
    origin_zyx=(5.0, -10.0, 20.0),
    direction_zyx=((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
)
SCAN = Volume(voxels=np.random.default_rng(2).integers(0, 400, GEOMETRY.shape_zyx).astype(np.int16), geometry=GEOMETRY)


class CountingStore(FolderStore):
    """A folder store that remembers what was read."""

    def __init__(self, root):
        super().__init__(root)
        self.read = []

    def get(self, key):
        self.read.append(key)
        return super().get(key)


@pytest.fixture
def store(tmp_path):
    return CountingStore(tmp_path / "store")


def blocks(*values, tops=(10, 40, 70)):
    """A label map with a vertebra of 16 mL for each value, from below."""
    voxels = np.zeros(GEOMETRY.shape_zyx, dtype=np.uint8)
    for value, start in zip(values, tops, strict=False):
        voxels[start : start + 20, 15:45, 15:42] = value
    return Mask(voxels=voxels, geometry=GEOMETRY)


def stored(
    store,
    labels,
    levels,
    *,
    volume=SCAN,
    mask_hash="5" * 64,
    manifest_id="6" * 64,
    roi_kind="body",
    bodies=None,
    acquisition=None,
    warnings=(),
    source="nifti",
    **record,
):
    """A series as ingest leaves it, and the fact that tells of its masks."""
    grid = volume.geometry
    manifest = SeriesManifest(
        study_id=STUDY,
        series_id=SERIES,
        manifest_id=manifest_id,
        image_hash=IMAGE,
        instances=100,
        patient_id=PATIENT,
        grid=GridRecord(
            shape_zyx=grid.shape_zyx,
            spacing_zyx=grid.spacing_zyx,
            origin_zyx=grid.origin_zyx,
            direction_zyx=grid.direction_zyx,
        ),
        acquisition=acquisition or Acquisition(),
        demographics=Demographics(age_years=71, sex="F"),
        mask_hash=mask_hash,
        warnings=warnings,
    )
    masks = MaskRecord(
        series_id=SERIES,
        mask_hash=mask_hash,
        source=source,
        roi_kind=roi_kind,
        has_body_mask=bodies is not None,
        levels=levels,
        **record,
    )
    store.put(keys.volume(SERIES, IMAGE), to_nrrd(volume))
    store.put(keys.mask(SERIES, mask_hash), to_nrrd(labels))
    if bodies is not None:
        store.put(keys.body_mask(SERIES, mask_hash), to_nrrd(bodies))
    store.put(keys.mask_record(SERIES, mask_hash), masks.to_bytes())
    store.put(keys.manifest(SERIES, manifest_id), manifest.to_bytes())
    return MasksReady(
        study_id=STUDY, series_id=SERIES, manifest_id=manifest_id, protocols=PROTOCOLS, mask_hash=mask_hash
    )


class Here(ProcessPool):
    """A pool whose jobs run here, so that a test can put something in their way."""

    def run(self, job, *args, **kwargs):
        return job(*args, **kwargs)


def be_killed():
    os.kill(os.getpid(), signal.SIGKILL)


class Poisoned(ProcessPool):
    """A pool in which every job is killed, as by the system when memory runs out."""

    def run(self, job, *args, **kwargs):
        return super().run(be_killed)


def budget(kind=ProcessPool, *, seconds=60.0, memory_gib=4.0):
    return kind(what="the resampling", processes=1, seconds=seconds, memory_gib=memory_gib, jobs_per_process=10)


def note_each(facts, told):
    """As a list would hold them, but what came before an error is there."""
    for fact in facts:
        told.append(fact)


def handle(store, fact, *, protocol=PROTOCOL, settings=None, pool=None, wanted=None, mask_sources=()):
    service = resampler_service(
        store=store, protocol=protocol, settings=settings, pool=pool, wanted=wanted, mask_sources=mask_sources
    )
    try:
        return list(service.handlers[MasksReady](fact))
    finally:
        service.close()


def plans(store):
    return revisions(store, keys.series_plans(SERIES), SeriesPlan)


def record_of(store, fact, protocol=PROTOCOL):
    return read_record(store, keys.case_record(protocol.crop_hash, fact.case_id), CaseRecord)


def outcome_of(store, fact, kind, model):
    return read_record(store, keys.outcome(kind, fact.protocols.scope, fact.case_id), model)


def told_by_level(store, facts):
    levels = {case.case_id: case.level for plan in plans(store) for case in plan.cases}
    return {levels[fact.case_id]: fact for fact in facts}


def test_each_labelled_level_becomes_a_case_told_from_head_to_foot(store):
    fact = stored(store, blocks(20, 21, 22), {"L3": 20, "L2": 21, "L1": 22})

    told = handle(store, fact)

    assert [type(one) for one in told] == [CaseReady] * 3
    assert [case.level for case in plans(store)[0].cases] == ["L1", "L2", "L3"]
    assert [one.case_id for one in told] == [case.case_id for case in plans(store)[0].cases]
    assert all(one.protocols == PROTOCOLS and one.series_id == SERIES for one in told)


def test_the_stored_crop_is_that_of_the_method_and_its_record_says_what_it_is(store):
    labels = blocks(20, 21, 22)
    fact = stored(store, labels, {"L2": 21})

    (ready,) = handle(store, fact)

    expected = crop_vertebra(SCAN, replace(labels, voxels=labels.voxels == 21), PROTOCOL)
    image = volume_from_nrrd(store.get(keys.case_image(PROTOCOL.crop_hash, ready.case_id)))
    mask = mask_from_nrrd(store.get(keys.case_mask(PROTOCOL.crop_hash, ready.case_id)))
    record = record_of(store, ready)
    assert np.array_equal(image.voxels, expected.image.voxels)
    assert np.array_equal(mask.voxels, expected.mask.voxels)
    assert (record.level, record.roi_kind, record.mask_source) == ("L2", "body", "nifti")
    assert record.volume_ml == pytest.approx(16.2)
    assert record.demographics == Demographics(age_years=71, sex="F")
    assert record.guards == ()


def test_warnings_of_scan_mask_guards_and_crop_stand_in_the_record(store):
    fact = stored(
        store,
        blocks(20, tops=(4,)),
        {"L3": 20},
        acquisition=Acquisition(contrast_agent=True),
        warnings=(Warned(code="lossy", sentence="the pixels were compressed with loss"),),
    )

    (ready,) = handle(store, fact)

    assert [warning.code for warning in record_of(store, ready).warnings] == ["lossy", "contrast-agent", "margin"]


def test_a_case_that_a_guard_stops_is_not_evaluated_with_every_reason_and_has_no_crop(store):
    fact = stored(store, blocks(20, 21, tops=(0, 40)), {"S1": 20, "L5": 21})

    told = told_by_level(store, handle(store, fact))

    assert {level: type(one) for level, one in told.items()} == {"L5": CaseReady, "S1": CaseNotEvaluated}
    record = outcome_of(store, told["S1"], "not-evaluated", NotEvaluated)
    assert (record.kind, record.codes) == ("guard", ("level", "border"))
    assert not store.exists(keys.case_image(PROTOCOL.crop_hash, told["S1"].case_id))
    assert [guard.code for guard in record_of(store, told["S1"]).guards] == ["level", "border"]


def test_a_level_that_its_mask_refuses_is_a_rejected_case(store):
    fact = stored(store, blocks(20), {"L3": 20}, refused={"L1": "two masks for L1"})

    told = told_by_level(store, handle(store, fact))

    assert {level: type(one) for level, one in told.items()} == {"L1": CaseRejected, "L3": CaseReady}
    assert outcome_of(store, told["L1"], "rejected", Rejection).reasons == ("two masks for L1",)


def test_a_region_too_thin_for_the_grid_is_a_rejected_case_and_the_others_go_on(store):
    volume = replace(SCAN, geometry=replace(GEOMETRY, spacing_zyx=(0.3, 1.0, 1.0)))
    labels = np.zeros(GEOMETRY.shape_zyx, dtype=np.uint8)
    labels[5, 5:55, 5:55] = 20
    labels[20:80, 15:45, 15:42] = 21
    fact = stored(store, Mask(voxels=labels, geometry=volume.geometry), {"L3": 20, "L2": 21}, volume=volume)

    told = told_by_level(store, handle(store, fact, settings=ResamplerSettings(min_volume_ml=0.1)))

    assert {level: type(one) for level, one in told.items()} == {"L2": CaseReady, "L3": CaseRejected}
    assert "too thin" in outcome_of(store, told["L3"], "rejected", Rejection).reasons[0]


def test_told_again_the_same_facts_follow_and_nothing_is_computed_or_planned_again(store):
    fact = stored(store, blocks(20, 21, tops=(0, 40)), {"S1": 20, "L5": 21}, refused={"L1": "two masks for L1"})
    first = handle(store, fact)
    store.read.clear()

    second = handle(store, fact)

    assert second == first
    assert len(plans(store)) == 1
    assert not [key for key in store.read if key.startswith("volumes/") or key.endswith(".nrrd")]


def test_a_run_that_stopped_half_way_goes_on(store):
    fact = stored(store, blocks(20, 21), {"L3": 20, "L2": 21})
    service = resampler_service(store=store, protocol=PROTOCOL)
    first = next(iter(service.handlers[MasksReady](fact)))
    service.close()

    told = handle(store, fact)

    assert told[0] == first
    assert [type(one) for one in told] == [CaseReady, CaseReady]
    assert len(plans(store)) == 1


def drop(store, *suffixes):
    """What retention drops; returns what was there."""
    gone = {key: store.get(key) for key in store.keys("") if key.endswith(suffixes)}
    for key in gone:
        store.delete(key)
    return gone


@pytest.mark.parametrize("dropped", [("/image.nrrd", "/mask.nrrd"), ("/mask.nrrd",), ("/image.nrrd",)])
def test_a_dropped_crop_that_features_are_wanted_of_is_made_again_to_the_last_byte(store, dropped):
    fact = stored(store, blocks(20, 21), {"L3": 20, "L2": 21})
    first = handle(store, fact)
    records = {key: store.get(key) for key in store.keys("cases/") if key.endswith(".json")}
    gone = drop(store, *dropped)

    again = handle(store, fact)

    assert again == first
    assert len(gone) == 2 * len(dropped)
    assert {key: store.get(key) for key in gone} == gone
    assert {key: store.get(key) for key in store.keys("cases/") if key.endswith(".json")} == records


def test_a_dropped_crop_of_whole_vertebrae_is_cut_by_their_bodies_again(store):
    labels = blocks(20)
    fact = stored(store, labels, {"L3": 20}, roi_kind="vertebra", bodies=halves(labels))
    handle(store, fact)
    gone = drop(store, "/image.nrrd", "/mask.nrrd")

    handle(store, fact)

    assert {key: store.get(key) for key in gone} == gone


def features(store, ready, *kinds):
    for kind in kinds:
        key = keys.hcr_features if kind == "hcr" else keys.dtl_features
        store.put(key(PROTOCOLS.hcr_hash if kind == "hcr" else PROTOCOLS.dtl_hash, ready.case_id), b"{}")


def test_a_case_that_is_decided_needs_no_crop_again_and_no_volume(store):
    fact = stored(store, blocks(20), {"L3": 20})
    (ready,) = handle(store, fact)
    store.put(keys.outcome("classified", PROTOCOLS.scope, ready.case_id), b"{}")
    drop(store, ".nrrd")
    store.read.clear()

    assert handle(store, fact) == [ready]
    assert not [key for key in store.keys("") if key.endswith(".nrrd")]
    assert not [key for key in store.read if key.endswith(".nrrd")]


def test_with_both_vectors_there_a_crop_comes_back_for_its_picture_where_the_volume_is(store):
    fact = stored(store, blocks(20), {"L3": 20})
    (ready,) = handle(store, fact)
    features(store, ready, "hcr", "dtl")
    gone = drop(store, "/image.nrrd", "/mask.nrrd")

    told = handle(store, fact)

    assert told == [ready]
    assert {key: store.get(key) for key in gone} == gone


def test_with_both_vectors_there_a_case_goes_on_without_volume_and_crop(store):
    fact = stored(store, blocks(20), {"L3": 20})
    (ready,) = handle(store, fact)
    features(store, ready, "hcr", "dtl")
    drop(store, ".nrrd")

    assert handle(store, fact) == [ready]


@pytest.mark.parametrize("there", [(), ("hcr",), ("dtl",)])
def test_where_a_vector_is_wanted_and_the_volume_is_gone_the_reason_says_what_to_do(store, there):
    fact = stored(store, blocks(20), {"L3": 20})
    (ready,) = handle(store, fact)
    features(store, ready, *there)
    drop(store, ".nrrd")

    with pytest.raises(Retry, match="sweep the study with its masks again"):
        handle(store, fact)


def test_a_case_that_was_rejected_is_told_so_again_when_the_volume_is_gone(store):
    volume = replace(SCAN, geometry=replace(GEOMETRY, spacing_zyx=(0.3, 1.0, 1.0)))
    labels = np.zeros(GEOMETRY.shape_zyx, dtype=np.uint8)
    labels[5, 5:55, 5:55] = 20
    fact = stored(store, Mask(voxels=labels, geometry=volume.geometry), {"L3": 20}, volume=volume)
    first = handle(store, fact, settings=ResamplerSettings(min_volume_ml=0.1))
    drop(store, ".nrrd")

    again = handle(store, fact)

    assert [type(one) for one in first] == [CaseRejected]
    assert again == first


def test_another_mask_is_a_new_revision_of_the_plan_with_new_cases(store):
    first = handle(store, stored(store, blocks(20), {"L3": 20}))

    second = handle(store, stored(store, blocks(21), {"L3": 21}, mask_hash="7" * 64, manifest_id="8" * 64))

    assert [(plan.revision, plan.supersedes) for plan in plans(store)] == [(1, None), (2, 1)]
    assert first[0].case_id != second[0].case_id


def test_an_older_manifest_told_late_adds_no_revision(store):
    old = stored(store, blocks(20), {"L3": 20})
    handle(store, old)
    handle(store, stored(store, blocks(21), {"L3": 21}, mask_hash="7" * 64, manifest_id="8" * 64))

    handle(store, old)

    assert [plan.revision for plan in plans(store)] == [1, 2]


def test_the_same_series_under_another_protocol_keeps_its_plan_and_gets_other_crops(store):
    fact = stored(store, blocks(20), {"L3": 20})
    (first,) = handle(store, fact)
    paper = CropProtocol(roi_margin_mm=10.0)

    (second,) = handle(
        store,
        fact.model_copy(update={"protocols": PROTOCOLS.model_copy(update={"crop_hash": paper.crop_hash})}),
        protocol=paper,
    )

    assert first.case_id == second.case_id
    assert len(plans(store)) == 1
    assert store.exists(keys.case_image(paper.crop_hash, second.case_id))


def test_a_series_of_another_bundle_is_tried_later_and_the_reason_says_which_is_loaded(store):
    fact = stored(store, blocks(20), {"L3": 20})
    other = CropProtocol(roi="vertebra")

    with pytest.raises(Retry, match=rf"{PROTOCOL.crop_hash[:12]}.*{other.crop_hash[:12]}"):
        handle(store, fact, protocol=other)


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ({}, "the mask is empty"),
        ({"ignored_labels": 12}, "12 labels of other organs"),
        ({"unknown_labels": ("130", "131")}, "130, 131"),
        ({"not_chosen": ("L1", "L2")}, r"it has L1, L2"),
    ],
)
def test_a_mask_without_a_case_rejects_the_series_before_a_plan_is_written(store, record, sentence):
    fact = stored(store, blocks(), {}, **record)

    with pytest.raises(Reject, match=sentence):
        handle(store, fact)
    assert plans(store) == []


def test_a_mask_on_another_grid_rejects_the_series_before_a_plan_is_written(store):
    moved = replace(blocks(20), geometry=replace(GEOMETRY, origin_zyx=(0.0, 0.0, 0.0)))

    with pytest.raises(Reject, match="another grid"):
        handle(store, stored(store, moved, {"L3": 20}))
    assert plans(store) == []


def test_a_stored_volume_that_cannot_be_read_rejects_the_series(store):
    store.put(keys.volume(SERIES, IMAGE), b"NRRD0004\nnonsense")

    with pytest.raises(Reject, match="cannot be read"):
        handle(store, stored(store, blocks(20), {"L3": 20}))


def test_a_series_without_its_records_is_tried_later(store):
    fact = MasksReady(study_id=STUDY, series_id=SERIES, manifest_id="6" * 64, protocols=PROTOCOLS, mask_hash="5" * 64)

    with pytest.raises(Retry, match="not in the store"):
        handle(store, fact)


def halves(labels):
    """The anterior part of every vertebra, as the mask of its body."""
    voxels = (labels.voxels > 0).astype(np.uint8)
    voxels[:, 32:] = 0
    return Mask(voxels=voxels, geometry=GEOMETRY)


def test_whole_vertebrae_are_cut_by_a_body_mask(store):
    labels = blocks(20)
    fact = stored(store, labels, {"L3": 20}, roi_kind="vertebra", bodies=halves(labels))

    (ready,) = handle(store, fact)

    assert record_of(store, ready).roi_kind == "body"
    assert record_of(store, ready).volume_ml == pytest.approx(16.2 * 17 / 30)


def test_whole_vertebrae_without_a_body_mask_are_not_evaluated_by_a_model_of_bodies(store):
    (told,) = handle(store, stored(store, blocks(20), {"L3": 20}, roi_kind="vertebra"))

    record = outcome_of(store, told, "not-evaluated", NotEvaluated)
    assert record.codes == ("roi-kind",)
    assert "whole vertebrae" in record.reasons[0]


def test_whole_vertebrae_are_scored_whole_by_a_model_of_whole_vertebrae(store):
    labels, protocol = blocks(20), CropProtocol(roi="vertebra")
    fact = stored(store, labels, {"L3": 20}, roi_kind="vertebra", bodies=halves(labels))
    fact = fact.model_copy(update={"protocols": PROTOCOLS.model_copy(update={"crop_hash": protocol.crop_hash})})

    (ready,) = handle(store, fact, protocol=protocol)

    assert isinstance(ready, CaseReady)
    assert record_of(store, ready, protocol).volume_ml == pytest.approx(16.2)


def test_a_vertebra_of_which_the_cut_leaves_nothing_is_not_evaluated(store):
    labels = blocks(20, 21)
    bodies = halves(labels)
    bodies.voxels[:35] = 0
    fact = stored(store, labels, {"L3": 20, "L2": 21}, roi_kind="vertebra", bodies=bodies)

    told = told_by_level(store, handle(store, fact))

    assert {level: type(one) for level, one in told.items()} == {"L2": CaseReady, "L3": CaseNotEvaluated}
    assert outcome_of(store, told["L3"], "not-evaluated", NotEvaluated).codes == ("no-mask",)


def test_bodies_are_never_cut_again():
    labels = blocks(20)

    region = region_of(labels, 20, roi_kind="body", wanted="body", bodies=halves(labels))

    assert region.uncut is None
    assert region.roi.voxels.sum() == (labels.voxels == 20).sum()


def test_uncertain_levels_stand_last_in_a_plan():
    masks = MaskRecord(
        series_id=SERIES, mask_hash="5" * 64, source="nifti", roi_kind="body", levels={"B02": 2, "L1": 1, "T12": 3}
    )
    manifest = SeriesManifest.model_construct(series_id=SERIES, image_hash=IMAGE)

    assert [case.level for case in planned_cases(manifest, masks)] == ["T12", "L1", "B02"]
    assert no_case_reasons(masks) == ("the mask is empty",)


@pytest.mark.shared_data
def test_the_real_scan_of_3_mm_ends_as_the_method_says(store, shared_data):
    folder = shared_data / "totalseg-example"
    masks = folder / "spine_report" / "example_ct_report"
    labels = mask_from_sitk(sitk.ReadImage(str(masks / "totalseg.nii.gz")))
    bodies = mask_from_sitk(sitk.ReadImage(str(masks / "totalseg_vertebrae_body.nii.gz")))
    levels = {TOTALSEG[v]: int(v) for v in np.unique(labels.voxels) if int(v) in TOTALSEG}
    fact = stored(
        store,
        replace(labels, voxels=labels.voxels.astype(np.uint8)),
        levels,
        volume=volume_from_sitk(sitk.ReadImage(str(folder / "example_ct.nii.gz"))),
        roi_kind="vertebra",
        bodies=replace(bodies, voxels=(bodies.voxels == 1).astype(np.uint8)),
    )

    told = told_by_level(store, handle(store, fact))

    scored = {level for level, one in told.items() if isinstance(one, CaseReady)}
    assert scored == {"L1", "L2", "L3", "L4", "L5"}
    assert all(record_of(store, told[level]).warnings[0].code == "spacing" for level in scored)
    codes = {level: outcome_of(store, told[level], "not-evaluated", NotEvaluated).codes for level in set(told) - scored}
    assert codes["T11"] == ("no-mask", "border")
    assert codes["T12"] == ("border",)
    assert codes["S1"][0] == "level"


@pytest.mark.shared_data
def test_the_real_crop_around_l3_is_scored_with_a_margin_warning_and_its_cut_neighbours_are_not(store, shared_data):
    folder = shared_data / "tptbox-l3"
    labels = mask_from_sitk(sitk.ReadImage(str(folder / "sub-ct_seg-vert_label-22_msk.nii.gz")))
    parts = mask_from_sitk(sitk.ReadImage(str(folder / "sub-ct_seg-subreg_label-22_msk.nii.gz")))
    fact = stored(
        store,
        replace(labels, voxels=labels.voxels.astype(np.uint8)),
        {"L2": 21, "L3": 22, "L4": 23},
        volume=volume_from_sitk(sitk.ReadImage(str(folder / "sub-ct_label-22_ct.nii.gz"))),
        roi_kind="vertebra",
        bodies=replace(parts, voxels=np.isin(parts.voxels, (49, 50)).astype(np.uint8)),
    )

    told = told_by_level(store, handle(store, fact))

    assert {level for level, one in told.items() if isinstance(one, CaseReady)} == {"L3"}
    assert "margin" in [warning.code for warning in record_of(store, told["L3"]).warnings]
    for level in ("L2", "L4"):
        assert "border" in outcome_of(store, told[level], "not-evaluated", NotEvaluated).codes


def test_a_crop_that_fails_inside_itk_costs_its_own_case_and_its_text_stays_out_of_the_record(store, monkeypatch):
    def failing(volume, roi, protocol):
        if roi.voxels[10:30].any():
            raise RuntimeError("ITK ERROR in /home/someone/doe_jane.nrrd")
        return crop_vertebra(volume, roi, protocol)

    monkeypatch.setattr("services.resampler.series_crops.crop_vertebra", failing)

    fact = stored(store, blocks(20, 21), {"L3": 20, "L2": 21})
    told = told_by_level(store, handle(store, fact, pool=budget(Here)))

    assert {level: type(one) for level, one in told.items()} == {"L2": CaseReady, "L3": CaseRejected}
    reasons = outcome_of(store, told["L3"], "rejected", Rejection).reasons
    assert reasons == ("the crop could not be computed (RuntimeError)",)


def test_a_series_over_its_time_is_given_up_before_a_plan_is_written_and_done_once_it_is_raised(store):
    fact = stored(store, blocks(20, 21), {"L3": 20, "L2": 21})

    with pytest.raises(OverBudget, match=r"^the resampling took more than 0\.0001 s$"):
        handle(store, fact, settings=ResamplerSettings(series_seconds=0.0001))
    planned_before = plans(store)
    told = handle(store, fact)

    assert planned_before == []
    assert [type(one) for one in told] == [CaseReady, CaseReady]


def test_a_series_over_its_memory_is_given_up_and_the_next_one_is_done_by_the_same_worker(store, tmp_path):
    geometry = replace(GEOMETRY, shape_zyx=(1000, 512, 512))
    voxels = np.zeros(geometry.shape_zyx, dtype=np.uint8)
    voxels[10:30, 15:45, 15:42] = 20
    huge = stored(
        store,
        Mask(voxels=voxels, geometry=geometry),
        {"L3": 20},
        volume=Volume(voxels=np.zeros(geometry.shape_zyx, dtype=np.int16), geometry=geometry),
    )
    other = CountingStore(tmp_path / "other")
    fact = stored(other, blocks(20), {"L3": 20})

    with budget(memory_gib=1.0) as pool:
        service = resampler_service(store=store, protocol=PROTOCOL, pool=pool)
        with pytest.raises(OverBudget, match=r"^the resampling wanted more than 1 GiB$"):
            list(service.handlers[MasksReady](huge))
        (ready,) = resampler_service(store=other, protocol=PROTOCOL, pool=pool).handlers[MasksReady](fact)

    assert isinstance(ready, CaseReady)
    assert plans(store) == []


def test_a_case_over_the_memory_is_given_up_alone_and_done_once_it_is_raised(store):
    geometry = replace(GEOMETRY, shape_zyx=(300, 200, 200))
    voxels = np.zeros(geometry.shape_zyx, dtype=np.uint8)
    for value, start in ((20, 10), (21, 40)):
        voxels[start : start + 20, 15:45, 15:42] = value
    voxels[290, 190, 190] = 20  # an island: the crop of L3 spans the whole scan
    hu = np.random.default_rng(2).integers(0, 400, geometry.shape_zyx).astype(np.int16)
    fact = stored(
        store,
        Mask(voxels=voxels, geometry=geometry),
        {"L3": 20, "L2": 21},
        volume=Volume(voxels=hu, geometry=geometry),
    )
    told = []

    with budget(memory_gib=0.8) as pool:
        settings = ResamplerSettings(memory_gib=0.8)
        service = resampler_service(store=store, protocol=PROTOCOL, settings=settings, pool=pool)
        with pytest.raises(OverBudget, match=r"^the crop of L3 wanted more than 0\.8 GiB$"):
            note_each(service.handlers[MasksReady](fact), told)
    before = told_by_level(store, told)
    after = told_by_level(store, handle(store, fact))

    assert {level: type(one) for level, one in before.items()} == {"L2": CaseReady}
    assert {level: type(one) for level, one in after.items()} == {"L2": CaseReady, "L3": CaseReady}
    assert len(plans(store)) == 1


def test_a_series_whose_process_is_killed_is_tried_again_and_the_worker_lives_on(store):
    fact = stored(store, blocks(20), {"L3": 20})

    with budget(Poisoned) as pool:
        service = resampler_service(store=store, protocol=PROTOCOL, pool=pool)
        with pytest.raises(Retry) as raised:
            list(service.handlers[MasksReady](fact))
        service.ready()
        (ready,) = handle(store, fact)

    assert raised.value.reason == "the resampling process died (signal 9: out of memory?)"
    assert raised.value.exhausted == "over-budget"
    assert isinstance(ready, CaseReady)


# the height gate ---------------------------------------------------------------------------------------------------
def finding(level, decision, **more):
    lost = Banded(value=0.3, low=0.28, high=0.33)
    known = {"centre_zyx": (0.0, 0.0, 0.0), "volume_ml": 16.0, "reason": f"{level} is {decision}", **more}
    return Finding(level=level, decision=decision, loss=lost, grade=2, shape="wedge", **known)


def measured(store, fact, *findings, gated):
    """The spine record of a series, and the fact that names it."""
    spine = SpineRecord(
        series_id=SERIES,
        mask_hash=fact.mask_hash,
        segmenter=SegmenterNote(kind="built-in" if gated else "given"),
        levels_from="sacrum" if gated else "mask",
        gate="auto",
        gated=gated,
        limits=GateSettings(),
        findings=findings,
    )
    store.put(keys.spine(SERIES, "9" * 64), spine.to_bytes())
    return fact.model_copy(update={"spine_hash": "9" * 64})


def test_the_gate_lets_fractured_vertebrae_through_and_says_of_each_other_why_not(store):
    fact = stored(store, blocks(20, 21, 22), {"L1": 20, "L2": 21, "L3": 22})
    fact = measured(
        store,
        fact,
        finding("L1", "fractured"),
        finding("L2", "review", warnings=("borderline",)),
        finding("L3", "not-fractured"),
        gated=True,
    )

    facts = handle(store, fact)

    assert [type(one) for one in facts] == [CaseReady, CaseNotEvaluated, CaseNotEvaluated]
    kept_out = [
        read_record(store, keys.outcome("not-evaluated", PROTOCOLS.scope, one.case_id), NotEvaluated)
        for one in facts[1:]
    ]
    assert [(one.kind, one.reasons, one.codes, one.service) for one in kept_out] == [
        ("review", ("L2 is review", "borderline"), ("gate",), "segmenter"),
        ("not-fractured", ("L3 is not-fractured",), ("gate",), "segmenter"),
    ]
    record = read_record(store, keys.case_record(PROTOCOL.crop_hash, facts[0].case_id), CaseRecord)
    assert record.fracture_basis == (
        "fracture by height loss, seen by no reader: height loss 30% (28% to 33%), Genant grade 2 wedge"
    )
    assert not store.exists(
        keys.case_image(PROTOCOL.crop_hash, facts[1].case_id)
    )  # no crop is made of what is kept out


@pytest.mark.parametrize("known", [True, False])
def test_a_vertebra_whose_heights_are_not_known_is_not_scored_behind_the_gate(store, known):
    fact = stored(store, blocks(20), {"L1": 20})
    fact = measured(store, fact, *([finding("L1", "not-evaluable")] if known else []), gated=True)

    (told,) = handle(store, fact)

    kept_out = read_record(store, keys.outcome("not-evaluated", PROTOCOLS.scope, told.case_id), NotEvaluated)
    assert kept_out.kind == "guard"
    assert kept_out.reasons == (("L1 is not-evaluable",) if known else (NOT_MEASURED,))


def test_a_spine_that_only_annotates_keeps_nobody_out_and_its_heights_stand_with_the_case(store):
    fact = stored(store, blocks(20), {"L1": 20})
    fact = measured(store, fact, finding("L1", "not-fractured", warnings=("thick slices",)), gated=False)

    (told,) = handle(store, fact)

    assert isinstance(told, CaseReady)
    record = read_record(store, keys.case_record(PROTOCOL.crop_hash, told.case_id), CaseRecord)
    assert record.fracture_basis.startswith("fracture given by the mask, not assessed; measured: height loss 30%")
    assert Warned(code="heights", sentence="thick slices") in record.warnings


def test_a_cohort_is_never_gated(store):
    fact = stored(store, blocks(20), {"L1": 20})
    fact = measured(store, fact, finding("L1", "not-fractured"), gated=True)

    (told,) = handle(store, fact, wanted=lambda fact: {"L1"})

    assert isinstance(told, CaseReady)


def test_a_spine_record_that_is_not_there_yet_is_waited_for(store):
    fact = stored(store, blocks(20), {"L1": 20}).model_copy(update={"spine_hash": "9" * 64})

    with pytest.raises(Retry, match="spine record"):
        handle(store, fact)


@pytest.mark.parametrize("known", [True, False])
def test_automatic_masks_are_scored_by_a_bundle_that_knows_their_maker_alone(store, known):
    fact = stored(store, blocks(20), {"L1": 20}, source="automatic", segmenter="built-in spine 1 abc")
    fact = measured(store, fact, finding("L1", "fractured"), gated=True)

    (told,) = handle(store, fact, mask_sources=("given masks", "built-in spine 1 abc") if known else ("given masks",))

    assert isinstance(told, CaseReady if known else CaseNotEvaluated)
    if not known:
        kept_out = outcome_of(store, told, "not-evaluated", NotEvaluated)
        assert (kept_out.kind, kept_out.codes) == ("guard", ("mask-source",))
        assert "built-in spine 1 abc" in kept_out.reasons[0]


def test_an_uncertain_level_passes_where_the_segmenter_named_it_so(store):
    automatic = stored(store, blocks(101), {"B01": 101}, source="automatic", segmenter="x")
    (told,) = handle(store, measured(store, automatic, finding("B01", "fractured"), gated=True), mask_sources=("x",))

    given = stored(store, blocks(101), {"B01": 101}, mask_hash="7" * 64, manifest_id="8" * 64)
    (refused,) = handle(store, given, mask_sources=("x",))

    assert isinstance(told, CaseReady)
    assert isinstance(refused, CaseNotEvaluated)
