from pathlib import Path

import pytest

from services.deep_extractor.network import Network, check_golden
from services.radiomics_extractor.extraction import default_parameters, hcr_protocol
from services.trainer.cohort_extraction import CohortSpec
from services.trainer.demonstration import Recipe, train
from services.trainer.model_card import model_card
from services.trainer.pretraining import PretrainingSpec
from services.trainer.tiny_bundle import parameter_text
from shared.fracture.bundle import load_bundle

pytestmark = pytest.mark.trainer

SHIPPED = Path(__file__).resolve().parents[3] / "deploy" / "bundles" / "demo"


def test_the_shipped_bundle_is_small_enough_and_answers_as_on_the_day_it_was_made() -> None:
    bundle = load_bundle(SHIPPED)

    assert check_golden(Network(bundle.network_bytes(), device="cpu"), bundle.golden.image) < 1e-3
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) <= 30_000_000
    assert bundle.manifest.kind == "DEMO"


def test_the_shipped_bundle_was_fitted_on_the_features_that_the_extractor_gives() -> None:
    bundle = load_bundle(SHIPPED)

    protocol = hcr_protocol(parameters=default_parameters(), crop_hash=bundle.manifest.crop.crop_hash)

    assert bundle.pyradiomics_yaml.decode() == default_parameters()
    assert bundle.protocols.hcr_hash == protocol.hcr_hash


def test_the_model_card_says_phantom_and_its_numbers_are_those_of_the_metrics() -> None:
    bundle = load_bundle(SHIPPED)

    assert bundle.model_card == model_card(bundle.metrics)
    assert "no clinical meaning" in bundle.model_card
    assert "randomly initialised" in bundle.model_card


def test_the_whole_path_goes_from_phantoms_to_a_bundle_that_loads(tmp_path: Path) -> None:
    recipe = Recipe(
        cohort=CohortSpec(patients=14, seed=27, kappa=1.0),
        pretraining=PretrainingSpec(pictures=4, steps=1, seed=4, batch=2),
        folds=2,
        processes=1,
        threads=1,
    )

    made = train(recipe, out=tmp_path / "a", work=tmp_path / "work", parameters=parameter_text("original"))

    assert load_bundle(tmp_path / "a").bundle_id == made.bundle_id
    assert made.manifest.training.counts["patients"] == 14
    held = made.metrics["held_out"]
    assert isinstance(held, dict)
    assert set(held) == {"hcr", "dtl", "fusion", "nomogram", "random_dtl", "random_fusion"}
