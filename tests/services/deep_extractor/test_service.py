"""CaseReady in, features out: in a batch each case stands and falls alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from pydantic import BaseModel

from services.deep_extractor.network import Network
from services.deep_extractor.service import build, extract_batch
from services.deep_extractor.settings import DeepExtractorSettings
from shared.fracture import keys
from shared.fracture.bundle import Bundle, load_bundle
from shared.fracture.features import FeatureVector
from shared.fracture.ids import digest
from shared.fracture.messages import CaseReady, CaseRejected, FeaturesExtracted
from shared.fracture.records import Rejection
from shared.fracture.sagittal import sagittal_image
from shared.fracture.volume import Geometry, Mask, Volume, to_nrrd
from shared.pipeline.errors import FractureSweepError, OverBudget, Reject, Retry
from shared.pipeline.folder_store import FolderStore
from shared.records.archive import read_record
from tests.fixtures.small_bundle import brooding_network, load_small_bundle, reseal, small_network, write_small_bundle

SHAPE = (40, 44, 30)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return load_small_bundle(tmp_path_factory.mktemp("bundle") / "small")


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "store")


@pytest.fixture(scope="module")
def network(bundle: Bundle) -> Network:
    return Network(bundle.network_bytes(), device="cpu")


def _crop(seed: int, *, constant: bool = False) -> tuple[Volume, Mask]:
    geometry = Geometry(
        shape_zyx=SHAPE,
        spacing_zyx=(1.0, 1.0, 1.0),
        origin_zyx=(0.0, 0.0, 0.0),
        direction_zyx=((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
    )
    voxels = np.random.default_rng(seed).integers(-250, 1250, size=SHAPE).astype(np.int16)
    inside = np.zeros(SHAPE, dtype=np.uint8)
    inside[12:28, 12:32, 8:22] = 1
    if constant:
        voxels[:] = -250
    return Volume(voxels=voxels, geometry=geometry), Mask(voxels=inside, geometry=geometry)


def _ready(bundle: Bundle, store: FolderStore, name: str, *, seed: int = 0, constant: bool = False) -> CaseReady:
    case_id = digest(name)
    image, mask = _crop(seed, constant=constant)
    store.put(keys.case_image(bundle.protocols.crop_hash, case_id), to_nrrd(image))
    store.put(keys.case_mask(bundle.protocols.crop_hash, case_id), to_nrrd(mask))
    return _fact(bundle, name)


def _fact(bundle: Bundle, name: str) -> CaseReady:
    return CaseReady(
        study_id=digest("study"), series_id=digest("series"), case_id=digest(name), protocols=bundle.protocols
    )


def _vector(bundle: Bundle, store: FolderStore, fact: CaseReady) -> FeatureVector:
    return FeatureVector.from_bytes(store.get(keys.dtl_features(bundle.protocols.dtl_hash, fact.case_id)))


def _extract(
    facts: Sequence[BaseModel], *, store: FolderStore, network: Network, bundle: Bundle
) -> list[list[BaseModel] | Exception]:
    answers = extract_batch(facts, store=store, network=network, protocol=bundle.manifest.dtl)
    return [answer if isinstance(answer, Exception) else list(answer) for answer in answers]


def test_the_features_are_stored_before_they_are_told(bundle: Bundle, store: FolderStore, network: Network) -> None:
    fact = _ready(bundle, store, "case", seed=1)

    answers = _extract([fact], store=store, network=network, bundle=bundle)

    assert answers == [
        [FeaturesExtracted(**fact.model_dump(exclude={"protocols"}), protocols=fact.protocols, kind="dtl")]
    ]
    vector = _vector(bundle, store, fact)
    picture = sagittal_image(*_crop(1), box="square", box_margin_mm=10.0)
    np.testing.assert_array_equal(vector.values, network.features([picture])[0])
    assert vector.names == bundle.models.pca.inputs
    assert vector.protocol_hash == bundle.protocols.dtl_hash
    assert vector.provenance["execution_provider"] == "CPUExecutionProvider"


def test_a_batch_and_single_cases_give_the_same_bytes(bundle: Bundle, network: Network, tmp_path: Path) -> None:
    together, alone = FolderStore(tmp_path / "together"), FolderStore(tmp_path / "alone")
    facts = [_ready(bundle, together, f"case {n}", seed=n) for n in range(8)]
    for n in range(8):
        _ready(bundle, alone, f"case {n}", seed=n)

    _extract(facts, store=together, network=network, bundle=bundle)
    for fact in facts:
        _extract([fact], store=alone, network=network, bundle=bundle)

    for fact in facts:
        key = keys.dtl_features(bundle.protocols.dtl_hash, fact.case_id)
        assert together.get(key) == alone.get(key)


def test_one_bad_case_of_each_kind_fails_alone(bundle: Bundle, store: FolderStore, network: Network) -> None:
    good, also_good = _ready(bundle, store, "good", seed=1), _ready(bundle, store, "also good", seed=2)
    missing = _fact(bundle, "missing")
    constant = _ready(bundle, store, "constant", constant=True)
    corrupt = _fact(bundle, "corrupt")
    for key in (keys.case_image, keys.case_mask):
        store.put(key(bundle.protocols.crop_hash, corrupt.case_id), b"NRRD0005\nnot really")

    answers = _extract([good, missing, constant, corrupt, also_good], store=store, network=network, bundle=bundle)

    assert isinstance(answers[0], list)
    assert isinstance(answers[4], list)
    assert isinstance(answers[1], Retry)
    assert "not in the store" in answers[1].reason
    assert isinstance(answers[2], Reject)
    assert "constant" in answers[2].reasons[0]
    assert isinstance(answers[3], Reject)
    assert "cannot be read" in answers[3].reasons[0]
    assert len(list(store.keys("features/"))) == 2


def test_a_picture_that_breaks_the_network_takes_no_neighbour_with_it(
    bundle: Bundle, store: FolderStore, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = [_ready(bundle, store, f"case {n}", seed=n) for n in range(3)]
    poison = sagittal_image(*_crop(1), box="square", box_margin_mm=10.0)
    real = network.features

    def breaking(pictures: Sequence[np.typing.NDArray[np.float32]]) -> list[np.typing.NDArray[np.float64]]:
        if any(np.array_equal(picture, poison) for picture in pictures):
            raise MemoryError("no room")
        return real(pictures)

    monkeypatch.setattr(network, "features", breaking)

    answers = _extract(facts, store=store, network=network, bundle=bundle)

    assert isinstance(answers[1], RuntimeError)
    assert isinstance(answers[0], list)
    assert isinstance(answers[2], list)


def test_a_case_over_its_time_is_given_up_and_its_neighbours_have_their_features(
    bundle: Bundle, store: FolderStore
) -> None:
    facts = [_ready(bundle, store, f"case {n}", seed=n) for n in range(3)]
    poison = _fact(bundle, "poison")
    image, mask = _crop(0, constant=True)
    image.voxels[20, 20, 8:22] = 1250
    store.put(keys.case_image(bundle.protocols.crop_hash, poison.case_id), to_nrrd(image))
    store.put(keys.case_mask(bundle.protocols.crop_hash, poison.case_id), to_nrrd(mask))
    slow = Network(brooding_network(), device="cpu", seconds=0.5)

    answers = _extract([facts[0], poison, *facts[1:]], store=store, network=slow, bundle=bundle)

    assert isinstance(answers[1], OverBudget)
    assert str(answers[1]) == "the network took more than 0.5 s"
    assert [type(answer) for answer in answers] == [list, OverBudget, list, list]
    assert len(list(store.keys("features/"))) == 3


def test_a_crop_that_claims_to_be_huge_is_given_up_before_memory_is_taken(
    bundle: Bundle, store: FolderStore, network: Network
) -> None:
    fact = _fact(bundle, "huge")
    header = to_nrrd(_crop(0)[0]).split(b"\n\n", 1)[0].replace(b"sizes: 30 44 40", b"sizes: 30000 44000 40000")
    for key in (keys.case_image, keys.case_mask):
        store.put(key(bundle.protocols.crop_hash, fact.case_id), header + b"\n\nlittle")

    answers = _extract([fact], store=store, network=network, bundle=bundle)

    assert isinstance(answers[0], OverBudget)
    assert "claims 52800000000000 voxels" in str(answers[0])


def test_features_that_are_there_are_told_and_not_computed(
    bundle: Bundle, store: FolderStore, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    fact = _ready(bundle, store, "case")
    first = _extract([fact], store=store, network=network, bundle=bundle)
    monkeypatch.setattr(network, "features", lambda pictures: pytest.fail("computed again"))

    again = _extract([fact], store=store, network=network, bundle=bundle)

    assert again == first


def test_a_case_that_is_decided_needs_no_features_again(bundle: Bundle, store: FolderStore, network: Network) -> None:
    decided = _fact(bundle, "decided")
    store.put(keys.outcome("classified", decided.protocols.scope, decided.case_id), b"{}")

    (answer,) = _extract([decided], store=store, network=network, bundle=bundle)

    assert isinstance(answer, list)
    assert [type(told) for told in answer] == [FeaturesExtracted]
    assert not list(store.keys("features/"))


def test_a_case_of_another_protocol_waits_for_a_worker_that_has_it(
    bundle: Bundle, store: FolderStore, network: Network
) -> None:
    fact = _ready(bundle, store, "case")
    other = fact.model_copy(update={"protocols": fact.protocols.model_copy(update={"dtl_hash": "0" * 64})})

    answers = _extract([other], store=store, network=network, bundle=bundle)

    assert isinstance(answers[0], Retry)
    assert "another DTL protocol" in answers[0].reason


def test_features_for_training_need_no_bundle_in_the_message(
    bundle: Bundle, store: FolderStore, network: Network
) -> None:
    fact = _ready(bundle, store, "case")
    training = fact.model_copy(update={"protocols": fact.protocols.model_copy(update={"bundle_id": None})})

    answers = _extract([training], store=store, network=network, bundle=bundle)

    assert isinstance(answers[0], list)
    assert _vector(bundle, store, fact).kind == "dtl"


def test_the_service_gathers_as_its_settings_say_and_tells_its_device(bundle: Bundle, store: FolderStore) -> None:
    told: list[tuple[str, str]] = []

    service = build(
        store=store,
        bundle=bundle,
        settings=DeepExtractorSettings(device="cpu", batch_size=5, batch_wait_seconds=0.5),
        tell_device=lambda name, device: told.append((name, device)),
    )

    batch = service.batches[CaseReady]
    assert (batch.size, batch.wait_seconds) == (5, 0.5)
    assert told == [("deep-extractor", "cpu")]
    fact = _ready(bundle, store, "case")
    assert len(list(batch.handler([fact]))) == 1


def test_a_rejected_case_is_recorded_before_it_is_told(bundle: Bundle, store: FolderStore) -> None:
    service = build(store=store, bundle=bundle)
    fact = _fact(bundle, "case")

    told = list(service.rejected(fact, ("the sagittal slice is constant",)))

    assert [type(one) for one in told] == [CaseRejected]
    record = read_record(store, keys.outcome("rejected", bundle.bundle_id, fact.case_id), Rejection)
    assert record.service == "deep-extractor"


def test_a_network_whose_golden_image_does_not_come_out_does_not_start(tmp_path: Path, store: FolderStore) -> None:
    folder = write_small_bundle(tmp_path / "bundle")
    (folder / "network.onnx").write_bytes(small_network(seed=99))
    reseal(folder)
    bundle = load_bundle(folder)

    with pytest.raises(FractureSweepError, match="golden image"):
        build(store=store, bundle=bundle)
