"""Fan-in through the store: the second vector scores the case, once, from the bundle alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from services.fusion_classifier.service import build, classify
from services.fusion_classifier.settings import FusionClassifierSettings
from shared.fracture import keys
from shared.fracture.bundle import Bundle, load_bundle
from shared.fracture.bundle_files import BundleError
from shared.fracture.features import FeatureVector
from shared.fracture.ids import digest
from shared.fracture.messages import CaseNotEvaluated, Fact, FeaturesExtracted, FractureClassified
from shared.fracture.protocol import Protocols
from shared.fracture.records import Acquisition, CaseRecord, Classified, Demographics, NotEvaluated, Warned
from shared.fracture.scoring import Classification, score
from shared.pipeline.errors import NewerSchema, Reject, Retry
from shared.pipeline.folder_store import FolderStore
from shared.records.archive import read_record, write_record
from tests.fixtures.small_bundle import (
    load_small_bundle,
    reseal,
    small_vectors,
    stump,
    write_classifier_bundle,
)

CASE, SERIES, STUDY = digest("case"), digest("series"), digest("study")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return load_small_bundle(tmp_path_factory.mktemp("bundle") / "small")


@pytest.fixture
def store(tmp_path: Path, bundle: Bundle) -> FolderStore:
    store = FolderStore(tmp_path / "store")
    _put_case(store, bundle)
    return store


def _put_case(store: FolderStore, bundle: Bundle, *, age: int | None = 60, kernel: str = "B60") -> None:
    record = CaseRecord(
        case_id=CASE,
        study_id=STUDY,
        series_id=SERIES,
        manifest_id=digest("manifest"),
        image_hash=digest("image"),
        mask_hash=digest("mask"),
        mask_source="dicom-seg",
        patient_id=digest("patient"),
        level="L1",
        crop_hash=bundle.protocols.crop_hash,
        roi_kind="body",
        source_spacing_zyx=(2.0, 0.7, 0.7),
        acquisition=Acquisition(kvp=120.0, convolution_kernel=kernel),
        demographics=Demographics(age_years=age, sex="F"),
        warnings=(Warned(code="spacing", sentence="slice spacing 2.0 mm"),),
    )
    write_record(store, keys.case_record(bundle.protocols.crop_hash, CASE), record)


def _put_vectors(store: FolderStore, bundle: Bundle, *kinds: str, mean: float = 1.5) -> None:
    hcr, dtl = small_vectors(bundle, mean=mean)
    if "hcr" in kinds:
        store.put(keys.hcr_features(bundle.protocols.hcr_hash, CASE), hcr.to_bytes())
    if "dtl" in kinds:
        store.put(keys.dtl_features(bundle.protocols.dtl_hash, CASE), dtl.to_bytes())


def _fact(bundle: Bundle, *, kind: str = "dtl", protocols: Protocols | None = None) -> FeaturesExtracted:
    return FeaturesExtracted(
        study_id=STUDY,
        series_id=SERIES,
        case_id=CASE,
        protocols=protocols or bundle.protocols,
        kind="hcr" if kind == "hcr" else "dtl",
    )


def _classify(
    bundle: Bundle, store: FolderStore, fact: FeaturesExtracted | None = None, **settings: float
) -> tuple[Fact, ...]:
    return classify(fact or _fact(bundle), store=store, bundle=bundle, settings=FusionClassifierSettings(**settings))


def _record(bundle: Bundle, store: FolderStore) -> Classified:
    return read_record(store, keys.outcome("classified", bundle.bundle_id, CASE), Classified)


def test_the_first_vector_waits_and_the_second_scores(bundle: Bundle, store: FolderStore) -> None:
    _put_vectors(store, bundle, "hcr")
    first = _classify(bundle, store, _fact(bundle, kind="hcr"))
    _put_vectors(store, bundle, "dtl")
    second = _classify(bundle, store, _fact(bundle, kind="dtl"))

    assert first == ()
    assert second == (FractureClassified(study_id=STUDY, series_id=SERIES, case_id=CASE, protocols=bundle.protocols),)


def test_the_record_holds_what_the_bundle_says(bundle: Bundle, store: FolderStore) -> None:
    _put_vectors(store, bundle, "hcr", "dtl")

    _classify(bundle, store)

    record = _record(bundle, store)
    hcr, dtl = small_vectors(bundle)
    assert Classification.model_validate(record.classification | {}, strict=False) == score(
        bundle, hcr=hcr, dtl=dtl, age=60, sex="F"
    )
    assert (record.level, record.protocols) == ("L1", bundle.protocols)
    assert [warning.code for warning in record.warnings] == ["spacing"]


def test_a_record_that_is_there_is_told_and_not_computed_again(bundle: Bundle, store: FolderStore) -> None:
    _put_vectors(store, bundle, "hcr", "dtl")
    first = _classify(bundle, store)
    before = store.get(keys.outcome("classified", bundle.bundle_id, CASE))
    store.delete(keys.hcr_features(bundle.protocols.hcr_hash, CASE))

    again = _classify(bundle, store)

    assert again == first
    assert store.get(keys.outcome("classified", bundle.bundle_id, CASE)) == before


def test_features_made_for_training_are_not_scored(bundle: Bundle, store: FolderStore) -> None:
    _put_vectors(store, bundle, "hcr", "dtl")
    training = bundle.protocols.model_copy(update={"bundle_id": None})

    assert _classify(bundle, store, _fact(bundle, protocols=training)) == ()
    assert list(store.keys("outcomes/")) == []


@pytest.mark.parametrize("field", ["bundle_id", "hcr_hash", "dtl_hash", "crop_hash"])
def test_a_case_of_another_bundle_waits_for_a_worker_that_has_it(
    bundle: Bundle, store: FolderStore, field: str
) -> None:
    other = bundle.protocols.model_copy(update={field: "0" * 64})

    with pytest.raises(Retry, match="asks for another bundle"):
        _classify(bundle, store, _fact(bundle, protocols=other))


def test_without_age_the_fusion_stands_and_the_nomogram_says_why_not(bundle: Bundle, tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "ageless")
    _put_case(store, bundle, age=None)
    _put_vectors(store, bundle, "hcr", "dtl")

    told = _classify(bundle, store)

    assert isinstance(told[0], FractureClassified)
    classification = _record(bundle, store).classification
    assert classification["nomogram"] is None
    assert classification["nomogram_absent"] == "the patient's age is not known"
    assert 0 < classification["probability"] < 1


def test_some_features_outside_the_training_range_are_marked(bundle: Bundle, store: FolderStore) -> None:
    _put_vectors(store, bundle, "hcr", "dtl", mean=40.0)

    told = _classify(bundle, store)

    record = _record(bundle, store)
    assert isinstance(told[0], FractureClassified)
    assert record.warnings[-1].code == "outside-training-range"
    assert "1 of 4 selected features lie outside" in record.warnings[-1].sentence


def test_too_many_features_outside_the_training_range_are_not_evaluated(bundle: Bundle, store: FolderStore) -> None:
    _put_vectors(store, bundle, "hcr", "dtl", mean=40.0)

    told = _classify(bundle, store, max_outside_fraction=0.2)

    assert [type(one) for one in told] == [CaseNotEvaluated]
    record = read_record(store, keys.outcome("not-evaluated", bundle.bundle_id, CASE), NotEvaluated)
    assert (record.kind, record.codes) == ("guard", ("outside-training-range",))
    assert not store.exists(keys.outcome("classified", bundle.bundle_id, CASE))
    assert _classify(bundle, store, max_outside_fraction=0.2) == told


def test_a_kernel_that_training_never_saw_is_a_warning(bundle: Bundle, tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "kernel")
    _put_case(store, bundle, kernel="Br32")
    _put_vectors(store, bundle, "hcr", "dtl")

    _classify(bundle, store)

    assert "kernel" in [warning.code for warning in _record(bundle, store).warnings]


def test_a_vector_that_cannot_be_read_is_refused(bundle: Bundle, store: FolderStore) -> None:
    _put_vectors(store, bundle, "dtl")
    store.put(keys.hcr_features(bundle.protocols.hcr_hash, CASE), b"{")

    with pytest.raises(Reject, match="cannot be read"):
        _classify(bundle, store)


def test_a_vector_of_a_newer_version_is_not_refused_for_good(bundle: Bundle, store: FolderStore) -> None:
    _put_vectors(store, bundle, "dtl")
    store.put(keys.hcr_features(bundle.protocols.hcr_hash, CASE), b'{"schema": 2, "columns": {}}')

    with pytest.raises(NewerSchema, match="upgrade"):
        _classify(bundle, store)


def test_a_vector_of_another_list_is_refused(bundle: Bundle, store: FolderStore) -> None:
    _put_vectors(store, bundle, "dtl")
    short = FeatureVector(kind="hcr", names=("a",), values=np.ones(1), protocol_hash=bundle.protocols.hcr_hash)
    store.put(keys.hcr_features(bundle.protocols.hcr_hash, CASE), short.to_bytes())

    with pytest.raises(Reject, match="do not fit the bundle"):
        _classify(bundle, store)


def test_a_case_whose_record_is_not_there_is_tried_again(bundle: Bundle, tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "recordless")
    _put_vectors(store, bundle, "hcr", "dtl")

    with pytest.raises(Retry, match="record of the case"):
        _classify(bundle, store)


def test_the_service_hands_its_messages_on(bundle: Bundle, store: FolderStore) -> None:
    _put_vectors(store, bundle, "hcr", "dtl")
    service = build(store=store, bundle=bundle)

    told = list(service.handlers[FeaturesExtracted](_fact(bundle)))

    assert service.queues == ("fusion-classifier",)
    assert [type(one) for one in told] == [FractureClassified]


def test_a_bundle_with_classifiers_is_run_from_the_start(tmp_path: Path) -> None:
    bundle = load_bundle(write_classifier_bundle(tmp_path / "bundle"))
    store = FolderStore(tmp_path / "store")
    _put_case(store, bundle)
    _put_vectors(store, bundle, "hcr", "dtl")
    service = build(store=store, bundle=bundle)

    told = list(service.handlers[FeaturesExtracted](_fact(bundle)))

    hcr, dtl = small_vectors(bundle)
    expected = score(bundle.running(), hcr=hcr, dtl=dtl, age=60, sex="F")
    found = _record(bundle, store).classification
    assert [type(one) for one in told] == [FractureClassified]
    assert (found["probability"], found["prediction_set"]) == (expected.probability, ["acute"])
    assert (found["classifier"], found["score_kind"]) == ("random-forest", "lasso")


def test_a_service_whose_classifier_gives_other_numbers_does_not_start(tmp_path: Path) -> None:
    folder = write_classifier_bundle(tmp_path / "bundle")
    (folder / "classifier-fusion.onnx").write_bytes(stump(width=3, feature=0, left=0.125, right=0.25))
    bundle = load_bundle(reseal(folder))

    with pytest.raises(BundleError, match="golden vector 1 gives a fusion probability of"):
        build(store=FolderStore(tmp_path / "store"), bundle=bundle)


def test_a_record_holds_no_field_that_its_bundle_does_not_use(bundle: Bundle, store: FolderStore) -> None:
    _put_vectors(store, bundle, "hcr", "dtl")

    _classify(bundle, store)

    written = set(_record(bundle, store).classification)
    assert not written & {"prediction_set", "indeterminate", "score_kind", "classifier"}
