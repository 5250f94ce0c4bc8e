"""The whole of what is fitted, on drawn tables: honest by construction, and the same twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from services.trainer.cohort_table import CohortTable, TooSmall
from services.trainer.evaluation import scored
from services.trainer.results import MODELS, RunResult
from services.trainer.settings import CLASSIFIERS, TrainingSettings
from services.trainer.training import Trained, train
from services.trainer.weights import starting_weights
from shared.fracture.bundle import load_bundle
from tests.fixtures.training_cohorts import (
    NAMING,
    cohort_of,
    deep_features,
    drawn_table,
    image_features,
    quick,
)

pytestmark = pytest.mark.trainer
BY_COLUMN = {"by": "column"}


def run(table: CohortTable, settings: TrainingSettings, folder: Path) -> Trained:
    return train(
        cohort_of(table, settings),
        settings,
        naming=NAMING,
        start=starting_weights(settings.network, seed=settings.seed),
        image_features=image_features,
        deep_features=deep_features(table),  # type: ignore[arg-type]
        out=folder / "run",
        work=folder / "work",
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return run(drawn_table(), quick(split=BY_COLUMN), tmp_path_factory.mktemp("trained"))


def test_a_run_finds_what_is_there_and_says_all_of_it(trained: Trained) -> None:
    result = trained.result

    assert {(one.model, one.part) for one in result.scores} == {
        (model, part) for model in MODELS for part in ("train", "out_of_fold", "test")
    }
    held_out = {one.model: one.held_out for one in result.optimism}
    assert held_out["fusion"] is not None
    assert held_out["fusion"] > 0.8
    assert [step.cases for step in result.flow] == [len(result.cohort)]
    assert {row.part for row in result.cohort} == {"train", "test"}
    assert result.repeatability.method == "masks"
    assert len(result.repeatability.kept) == len(result.repeatability.features) - 1
    assert RunResult.model_validate_json(result.model_dump_json()) == result


def test_the_bundle_is_loaded_by_a_service_and_gives_the_probabilities_of_the_run(trained: Trained) -> None:
    table = drawn_table()
    test = np.array([side == "test" for side in table.split])
    bundle = load_bundle(trained.bundle.folder).running()

    found = scored(bundle, table.part(test), image_features(bundle.network_bytes(), table.images[test]))

    for one in found:
        assert one == trained.result.scored(one.model, "test")


def test_no_patient_s_values_and_no_patient_s_picture_are_in_the_bundle(trained: Trained) -> None:
    table = drawn_table()
    golden = load_bundle(trained.bundle.folder).golden

    for vector in golden.vectors:
        assert not np.isclose(table.hcr, np.array(vector.hcr), rtol=1e-9).all(axis=1).any()
    assert not any(np.allclose(picture, np.array(golden.image.pixels)) for picture in table.images)


def test_the_same_seed_gives_the_same_bundle_twice(trained: Trained, tmp_path: Path) -> None:
    again = run(drawn_table(), quick(split=BY_COLUMN), tmp_path)

    assert again.bundle.bundle_id == trained.bundle.bundle_id
    assert again.result.scores == trained.result.scores


def test_another_seed_gives_another_bundle(trained: Trained, tmp_path: Path) -> None:
    again = run(drawn_table(), quick(split=BY_COLUMN, seed=5), tmp_path)

    assert again.bundle.bundle_id != trained.bundle.bundle_id


def test_the_held_out_rows_change_nothing_of_the_bundle(trained: Trained, tmp_path: Path) -> None:
    table = drawn_table()
    test = np.array([side == "test" for side in table.split])
    rng = np.random.default_rng(3)
    hcr, images, acute, age = table.hcr.copy(), table.images.copy(), table.acute.copy(), table.age.copy()
    hcr[test] = rng.standard_normal(hcr[test].shape) * 1e6
    images[test] = rng.standard_normal(images[test].shape)
    acute[test] = 1 - acute[test]
    age[test] += 7
    other = replace(table, hcr=hcr, images=images, acute=acute, age=age)

    again = run(other, quick(split=BY_COLUMN), tmp_path)

    for file in sorted(trained.bundle.folder.iterdir()):
        assert (again.bundle.folder / file.name).read_bytes() == file.read_bytes(), file.name
    assert again.result.scored("fusion", "test") != trained.result.scored("fusion", "test")


@pytest.mark.parametrize("mode", ["crossfit", "in_sample"])
def test_the_network_may_be_fitted_on_the_labels(mode: str, tmp_path: Path) -> None:
    table = drawn_table(patients=40)

    found = run(table, quick(split=BY_COLUMN, network={"mode": mode}), tmp_path)

    assert found.bundle.manifest.training.dtl_mode == mode
    assert found.result.network.epochs
    assert found.bundle.models.dtl.inputs == ("dtl_logit",) if mode == "crossfit" else found.bundle.models.dtl.inputs
    assert any("never saw the patient" in one or "very rows" in one for one in found.result.warnings)


def test_beside_a_network_that_learned_stands_one_that_did_not(tmp_path: Path) -> None:
    table = drawn_table(patients=40)
    learned = {"mode": "in_sample"}

    found = run(table, quick(split=BY_COLUMN, network=learned), tmp_path / "with").result
    without = run(table, quick(split=BY_COLUMN, network={**learned, "random_line": False}), tmp_path / "without").result
    itself = run(table, quick(split=BY_COLUMN), tmp_path / "itself").result

    line = found.random_network
    assert line is not None
    # the same steps as the run whose own network is the random one
    dlr = next(one for one in itself.optimism if one.model == "dlr")
    assert line.out_of_fold == pytest.approx(dlr.out_of_fold, abs=0.05)  # of raw scores, not calibrated fold by fold
    assert line.held_out == pytest.approx(dlr.held_out, abs=1e-9)
    assert (without.random_network, itself.random_network) == (None, None)


def test_the_paper_preset_prints_its_optimism_beside_its_result(tmp_path: Path) -> None:
    table = drawn_table(patients=40)

    found = run(table, quick("paper", split=BY_COLUMN), tmp_path)

    assert found.result.settings.network.mode == "in_sample"
    assert found.bundle.models.fusion.score_kind == "lasso"
    assert {one.model for one in found.result.optimism} == set(MODELS)
    assert all(one.held_out is not None for one in found.result.optimism)
    assert any(one.step.startswith("Spearman 0.5") for one in found.result.selections[0].steps)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_classifier_gives_in_the_bundle_what_its_library_gives(name: str, tmp_path: Path) -> None:
    found = run(drawn_table(patients=40), quick(split=BY_COLUMN, classifiers={"names": [name]}), tmp_path)

    assert {one.winner.classifier for one in found.result.classifiers} == {name}
    assert all(one.onnx_largest_difference <= 1e-6 for one in found.result.classifiers)


def test_permuted_labels_give_an_auc_of_one_half_for_each_of_the_four_models(tmp_path: Path) -> None:
    areas: dict[str, list[float]] = {name: [] for name in MODELS}
    settings = quick(split=BY_COLUMN, selection={"stability_bootstraps": 0})
    for seed in range(20):
        table = drawn_table(seed=100 + seed, patients=160, held_share=0.5)
        people = np.unique(table.patient)
        # whole patients change places, so that a patient's vertebrae stay alike
        order = np.random.default_rng(seed).permutation(people)
        of = {number: table.acute[table.patient == number] for number in people}
        acute = np.concatenate([np.resize(of[order[n]], (table.patient == n).sum()) for n in people])
        found = run(replace(table, acute=acute), settings, tmp_path / str(seed))
        for one in found.result.optimism:
            assert one.held_out is not None
            areas[one.model].append(one.held_out)

    means = {name: float(np.mean(values)) for name, values in areas.items()}
    assert all(len(values) == 20 for values in areas.values())
    assert all(0.45 <= mean <= 0.55 for mean in means.values()), means


def test_a_model_without_skill_says_that_its_calibration_turned_around(tmp_path: Path) -> None:
    table = drawn_table(strength=0.0)

    found = run(table, quick(split=BY_COLUMN), tmp_path)

    turned = [one.branch for one in found.result.classifiers if one.platt_a <= 0]
    said = [one for one in found.result.warnings if "turned its scores around" in one]
    assert turned
    assert len(said) == len(turned)


def test_a_cohort_of_one_class_says_what_is_missing(tmp_path: Path) -> None:
    table = drawn_table()

    with pytest.raises(TooSmall, match="it needs chronic fractures in the training part, and there is none"):
        run(replace(table, acute=np.ones(len(table), dtype=np.int64)), quick(split=BY_COLUMN), tmp_path)


def test_too_few_patients_for_the_folds_say_which_step(tmp_path: Path) -> None:
    table = drawn_table(patients=60)

    with pytest.raises(TooSmall, match="out-of-fold scores: it needs 40 patients with acute fractures, one a fold"):
        run(table, quick(split=BY_COLUMN, classifiers={"out_of_fold": 40}), tmp_path)


def test_too_few_repeated_masks_say_so(tmp_path: Path) -> None:
    table = drawn_table()
    few = {name: replace(repeat, rows=repeat.rows[:2], hcr=repeat.hcr[:2]) for name, repeat in table.repeats.items()}

    with pytest.raises(TooSmall, match=r"repeatability \(inter\): it needs 5 training rows with a repeated mask"):
        run(replace(table, repeats=few), quick(split=BY_COLUMN), tmp_path)


def test_the_model_card_says_where_training_rows_lie_in_the_bundle(tmp_path: Path) -> None:
    table = drawn_table(patients=40)

    kept = run(table, quick(split=BY_COLUMN, classifiers={"names": ["knn"]}), tmp_path / "knn")
    not_kept = run(table, quick(split=BY_COLUMN, classifiers={"names": ["decision-tree"]}), tmp_path / "tree")

    assert "The classifier knn keeps standardised selected features" in kept.bundle.model_card.replace("\n  ", " ")
    assert "keeps standardised" not in not_kept.bundle.model_card
