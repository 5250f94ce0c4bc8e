import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from services.radiomics_extractor.extraction import extract, feature_names, hcr_protocol
from services.radiomics_extractor.process_pool import ExtractionPool, cores, extract_stored
from services.radiomics_extractor.service import check_protocol, extractor_service
from services.radiomics_extractor.settings import RadiomicsExtractorSettings
from shared.fracture import keys
from shared.fracture.features import FeatureVector
from shared.fracture.messages import CaseReady, FeaturesExtracted
from shared.fracture.protocol import Protocols
from shared.fracture.volume import Geometry, Mask, Volume, to_nrrd
from shared.pipeline.errors import FractureSweepError, OverBudget, Reject, Retry
from shared.pipeline.folder_store import FolderStore

CROP = "c" * 64
PARAMETERS = "imageType:\n  Original: {}\nfeatureClass:\n  firstorder:\nsetting:\n  binWidth: 25\n"
PROTOCOL = hcr_protocol(parameters=PARAMETERS, crop_hash=CROP)
PROTOCOLS = Protocols(crop_hash=CROP, hcr_hash=PROTOCOL.hcr_hash, dtl_hash="d" * 64, bundle_id="b" * 64)
ONE_PROCESS = RadiomicsExtractorSettings(processes=1)


def case(number):
    return CaseReady(study_id="1" * 64, series_id="2" * 64, case_id=f"{number:064x}", protocols=PROTOCOLS)


def crop(seed=0, *, inside=True):
    geometry = Geometry(
        shape_zyx=(16, 16, 16),
        spacing_zyx=(1.0, 1.0, 1.0),
        origin_zyx=(0.0, 0.0, 0.0),
        direction_zyx=((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
    )
    mask = np.zeros(geometry.shape_zyx, dtype=np.uint8)
    mask[4:12, 4:12, 4:12] = inside
    hu = np.random.default_rng(seed).integers(-100, 600, geometry.shape_zyx).astype(np.int16)
    return Volume(voxels=hu, geometry=geometry), Mask(voxels=mask, geometry=geometry)


def store_crop(store, fact, *, seed=0, inside=True):
    image, mask = crop(seed, inside=inside)
    store.put(keys.case_image(CROP, fact.case_id), to_nrrd(image))
    store.put(keys.case_mask(CROP, fact.case_id), to_nrrd(mask))


def handle(service, fact):
    return list(service.handlers[CaseReady](fact))


@pytest.fixture(scope="module")
def pool():
    with ExtractionPool(parameters=PARAMETERS, settings=ONE_PROCESS) as running:
        yield running


@pytest.fixture
def store(tmp_path):
    return FolderStore(tmp_path / "store")


@pytest.fixture
def service(store, pool):
    return extractor_service(store=store, protocol=PROTOCOL, parameters=PARAMETERS, pool=pool)


def misbehaving(image, mask, parameters):
    """In a process of the pool: does what the bytes of the image say."""
    match image:
        case b"die":
            os._exit(7)
        case b"killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case b"sleep":
            time.sleep(60)
        case b"memory":
            [b"x" * 2**26 for _ in range(64)]  # 4 GiB, every page written
        case b"slowly":
            time.sleep(0.3)
    return {"process": float(os.getpid())}


def misbehaving_pool(**settings):
    return ExtractionPool(
        parameters="", settings=RadiomicsExtractorSettings(processes=2, **settings), function=misbehaving
    )


def test_features_are_written_before_they_are_told(service, store):
    fact = case(1)
    store_crop(store, fact)

    told = handle(service, fact)

    expected = extract(*crop(), parameters=PARAMETERS)
    vector = FeatureVector.from_bytes(store.get(keys.hcr_features(PROTOCOL.hcr_hash, fact.case_id)))
    assert dict(zip(vector.names, vector.values.tolist(), strict=True)) == expected
    assert vector.protocol_hash == PROTOCOL.hcr_hash
    assert told == [
        FeaturesExtracted(
            study_id=fact.study_id, series_id=fact.series_id, case_id=fact.case_id, protocols=PROTOCOLS, kind="hcr"
        )
    ]


def test_features_that_are_there_are_told_again_and_not_computed(service, store):
    fact = case(2)
    store.put(keys.hcr_features(PROTOCOL.hcr_hash, fact.case_id), b"as it was")

    told = handle(service, fact)

    assert [type(one) for one in told] == [FeaturesExtracted]
    assert store.get(keys.hcr_features(PROTOCOL.hcr_hash, fact.case_id)) == b"as it was"


def test_a_case_that_is_decided_needs_no_features_again(service, store):
    fact = case(4)
    store.put(keys.outcome("not-evaluated", fact.protocols.scope, fact.case_id), b"{}")

    (told,) = handle(service, fact)

    assert told.kind == "hcr"
    assert not list(store.keys("features/"))


def test_a_case_of_another_bundle_is_tried_later_and_the_reason_says_which_is_loaded(service):
    other = PROTOCOLS.model_copy(update={"hcr_hash": "e" * 64})
    fact = case(3).model_copy(update={"protocols": other})

    with pytest.raises(Retry, match=f"eeeeeeeeeeee.*{PROTOCOL.hcr_hash[:12]}"):
        handle(service, fact)


def test_a_case_without_a_crop_is_tried_later(service):
    with pytest.raises(Retry, match="not in the store"):
        handle(service, case(4))


def test_a_crop_that_cannot_be_read_is_rejected(service, store):
    fact = case(5)
    store.put(keys.case_image(CROP, fact.case_id), b"NRRD0004\nnonsense")
    store.put(keys.case_mask(CROP, fact.case_id), b"")

    with pytest.raises(Reject, match="cannot be read"):
        handle(service, fact)


def test_a_crop_with_an_empty_mask_is_rejected(service, store):
    fact = case(6)
    store_crop(store, fact, inside=False)

    with pytest.raises(Reject, match="empty"):
        handle(service, fact)


def test_a_region_that_pyradiomics_refuses_is_rejected_in_its_words(service, store):
    fact = case(7)
    image, mask = crop()
    flat = np.zeros_like(mask.voxels)
    flat[8, 8, 8] = 1
    store.put(keys.case_image(CROP, fact.case_id), to_nrrd(image))
    store.put(keys.case_mask(CROP, fact.case_id), to_nrrd(Mask(voxels=flat, geometry=mask.geometry)))

    with pytest.raises(Reject, match="pyradiomics refuses the region"):
        handle(service, fact)


def test_a_service_has_a_slot_for_each_process(service, pool):
    assert service.slots == pool.processes == 1
    assert cores() >= 1
    service.ready()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"feature_names_sha256": "0" * 64}, "another list of 18 features"),
        ({"pyradiomics_version": "2.2.0"}, "fitted with pyradiomics 2.2.0"),
        ({"parameters_sha256": "0" * 64}, "not the one"),
    ],
)
def test_an_extractor_that_would_give_other_features_fails_at_start(change, sentence):
    with pytest.raises(FractureSweepError, match=sentence):
        check_protocol(PROTOCOL.model_copy(update=change), PARAMETERS)


def test_a_parameter_file_that_cannot_be_run_fails_at_start():
    with pytest.raises(FractureSweepError, match="cannot be run"):
        check_protocol(PROTOCOL, "imageType: [")


def test_a_process_that_dies_costs_its_own_case_alone():
    with misbehaving_pool() as pool:
        with ThreadPoolExecutor(2) as threads:
            neighbour = threads.submit(pool.extract, image=b"slowly", mask=b"")
            dying = threads.submit(pool.extract, image=b"die", mask=b"")
            assert neighbour.result()["process"] > 0
            with pytest.raises(Retry, match=r"died.*exit code 7"):
                dying.result()
        assert pool.extract(image=b"", mask=b"")["process"] > 0
        pool.check()


def test_a_process_is_replaced_after_its_number_of_cases():
    with ExtractionPool(
        parameters="",
        settings=RadiomicsExtractorSettings(processes=1, cases_per_process=2),
        function=misbehaving,
    ) as pool:
        seen = [pool.extract(image=b"", mask=b"")["process"] for _ in range(6)]

    assert max(seen.count(one) for one in seen) == 2
    assert len(set(seen)) == 3
    assert os.getpid() not in seen


def test_a_case_over_its_time_is_stopped_and_given_up():
    with misbehaving_pool(case_seconds=0.5) as pool:
        with pytest.raises(OverBudget, match=r"more than 0\.5 s"):
            pool.extract(image=b"sleep", mask=b"")
        assert pool.extract(image=b"", mask=b"")["process"] > 0


def test_a_case_over_its_memory_is_given_up_and_its_neighbours_are_not():
    with misbehaving_pool(memory_gib=3.0) as pool, ThreadPoolExecutor(2) as threads:
        neighbour = threads.submit(pool.extract, image=b"slowly", mask=b"")
        with pytest.raises(OverBudget, match=r"^the extraction wanted more than 3 GiB$"):
            pool.extract(image=b"memory", mask=b"")
        assert neighbour.result()["process"] > 0
        assert pool.extract(image=b"", mask=b"")["process"] > 0


def test_a_case_whose_process_is_killed_is_tried_again_and_then_says_out_of_memory():
    with misbehaving_pool() as pool:
        with pytest.raises(Retry) as raised:
            pool.extract(image=b"killed", mask=b"")
        assert pool.extract(image=b"", mask=b"")["process"] > 0

    assert raised.value.reason == "the extraction process died (signal 9: out of memory?)"
    assert raised.value.exhausted == "over-budget"


def test_a_stopped_pool_is_not_ready():
    pool = misbehaving_pool()
    pool.extract(image=b"", mask=b"")

    pool.close()

    with pytest.raises(FractureSweepError, match="restart the worker"):
        pool.check()


def test_the_features_of_a_process_are_those_of_the_function():
    image, mask = crop(5)

    found = extract_stored(to_nrrd(image), to_nrrd(mask), PARAMETERS)

    assert found == extract(image, mask, parameters=PARAMETERS)
    assert tuple(found) == feature_names(PARAMETERS)
