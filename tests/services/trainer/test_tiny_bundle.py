from pathlib import Path

import numpy as np
import pytest

from services.deep_extractor.network import Network, check_golden
from services.radiomics_extractor.extraction import feature_names, hcr_protocol
from services.trainer.tiny_bundle import feature_list, parameter_text, write_tiny_bundle
from shared.fracture.bundle import load_bundle


def test_the_tiny_bundle_loads_and_is_marked_as_a_demonstration(tmp_path: Path) -> None:
    written = write_tiny_bundle(tmp_path / "tiny")

    bundle = load_bundle(tmp_path / "tiny")

    assert bundle.bundle_id == written.bundle_id
    assert bundle.manifest.kind == "DEMO"
    assert len(bundle.hcr_features) == 1648


def test_the_same_seeds_give_the_same_bytes(tmp_path: Path) -> None:
    first = write_tiny_bundle(tmp_path / "a", seed=3)
    second = write_tiny_bundle(tmp_path / "b", seed=3)

    assert first.bundle_id == second.bundle_id
    assert (tmp_path / "a" / "manifest.json").read_bytes() == (tmp_path / "b" / "manifest.json").read_bytes()


def test_another_classifier_changes_the_bundle_and_no_feature_protocol(tmp_path: Path) -> None:
    first = write_tiny_bundle(tmp_path / "a").protocols

    second = write_tiny_bundle(tmp_path / "b", classifier_seed=1).protocols

    assert first.bundle_id != second.bundle_id
    assert (first.crop_hash, first.hcr_hash, first.dtl_hash) == (second.crop_hash, second.hcr_hash, second.dtl_hash)


def test_another_network_changes_the_dtl_protocol_alone(tmp_path: Path) -> None:
    first = write_tiny_bundle(tmp_path / "a").protocols

    second = write_tiny_bundle(tmp_path / "b", network_seed=1).protocols

    assert first.dtl_hash != second.dtl_hash
    assert (first.crop_hash, first.hcr_hash) == (second.crop_hash, second.hcr_hash)


def test_onnxruntime_gives_the_golden_features(tmp_path: Path) -> None:
    bundle = write_tiny_bundle(tmp_path / "tiny", network_seed=2)

    difference = check_golden(Network(bundle.network_bytes(), device="cpu"), bundle.golden.image)

    assert difference < 1e-5
    assert np.std(bundle.golden.image.features) > 0


@pytest.mark.parametrize("image_types", ["original", "full"])
def test_the_extractor_gives_the_features_that_the_bundle_names(image_types: str, tmp_path: Path) -> None:
    kind = "original" if image_types == "original" else "full"

    bundle = write_tiny_bundle(tmp_path / "tiny", image_types=kind)

    assert feature_names(parameter_text(kind)) == feature_list(kind) == bundle.hcr_features
    protocol = hcr_protocol(parameters=parameter_text(kind), crop_hash=bundle.manifest.crop.crop_hash)
    assert protocol.hcr_hash == bundle.protocols.hcr_hash
