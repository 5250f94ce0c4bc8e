from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from services.deep_extractor.network import Network
from services.trainer.fine_tuning import (
    FittedNetwork,
    batches,
    class_weights,
    crossfit,
    fit_network,
    inner_fold,
    rates,
)
from services.trainer.folds import fold_numbers
from services.trainer.network import exported, random_network
from services.trainer.settings import NetworkSettings
from shared.pipeline.errors import FractureSweepError

pytestmark = pytest.mark.trainer

SIZE = 32
Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]


def _settings(**changes: Any) -> NetworkSettings:
    plain: dict[str, Any] = {
        "architecture": "tiny", "device": "cpu", "epochs": 4, "batch": 8, "learning_rate": 0.05, "backbone_factor": 1,
        "patience": None,
    }  # fmt: skip
    return NetworkSettings.model_validate({**plain, **changes})


def _start(seed: int = 1) -> dict[str, torch.Tensor]:
    return dict(random_network("tiny", seed=seed).state_dict())


def _cohort(patients: int, *, seed: int = 1, band: float = 1.0) -> Arrays:
    """Pictures, labels and patients; the acute ones have a bright band in noise, somewhere in their upper half."""
    rng = np.random.default_rng(seed)
    patient = np.sort(np.concatenate([np.arange(patients), rng.integers(0, patients, patients // 2)]))
    acute = np.asarray((patient + rng.integers(0, 3, len(patient)) // 2) % 2, dtype=np.int64)
    images = rng.standard_normal((len(patient), SIZE, SIZE))
    for row in np.flatnonzero(acute):
        top = rng.integers(SIZE // 4, SIZE // 2)
        images[row, top : top + 3] += band
    images = (images - images.mean(axis=(1, 2), keepdims=True)) / images.std(axis=(1, 2), keepdims=True)
    return images.astype(np.float32), acute, patient.astype(np.int64)


def _features(onnx: bytes, images: np.ndarray) -> np.ndarray:
    return np.array(Network(onnx, device="cpu", intra_op_threads=1).features(list(images)))


def _loss(fitted: FittedNetwork, images: np.ndarray, acute: np.ndarray, weights: tuple[float, float]) -> float:
    """The weighted cross-entropy of what was fitted, from its parts and in float64."""
    with torch.no_grad():
        features = fitted.network()(torch.from_numpy(images)[:, None]).double().numpy()
    of_truth = np.where(acute == 1, 1, -1) * fitted.logit(features)
    weight = np.where(acute == 1, weights[1], weights[0])
    return float((weight * np.logaddexp(0, -of_truth)).sum() / weight.sum())


def _same(one: FittedNetwork, other: FittedNetwork) -> bool:
    return (
        all(torch.equal(tensor, other.backbone[name]) for name, tensor in one.backbone.items())
        and np.array_equal(one.weight, other.weight)
        and one.bias == other.bias
        and one.epochs == other.epochs
    )


# -- the schedule ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epoch", "head", "backbone"),
    [
        (0, 0.01, 0.0),
        (24, 0.01 * 0.5313952597646567, 0.0),
        (25, 0.005, 0.0005),
        (40, 0.01 * 0.09549150281252627, 0.001 * 0.09549150281252627),
        (49, 0.01 * 0.0009866357858642205, 0.001 * 0.0009866357858642205),
        (50, 0.0, 0.0),
    ],
)
def test_the_rates_follow_the_cosine_and_the_backbone_joins_at_half(epoch: int, head: float, backbone: float) -> None:
    assert rates(epoch, NetworkSettings()) == pytest.approx((head, backbone), abs=1e-15)


@pytest.mark.parametrize(("share", "first"), [(0.0, 0), (0.1, 3), (0.34, 11), (1.0, None)])
def test_the_backbone_moves_from_its_share_of_the_epochs_on(share: float, first: int | None) -> None:
    settings = NetworkSettings(epochs=30, frozen_share=share)

    moving = [epoch for epoch in range(30) if rates(epoch, settings)[1] > 0]

    assert moving == ([] if first is None else list(range(first, 30)))


def test_the_curves_say_the_rates_that_were_used(tmp_path: Path) -> None:
    images, acute, patient = _cohort(8)
    settings = _settings()

    fitted = fit_network(images, acute, patient, settings, seed=1, start=_start(), work=tmp_path)

    assert [(epoch.head_rate, epoch.backbone_rate) for epoch in fitted.epochs] == [rates(n, settings) for n in range(4)]
    assert [(epoch.fold, epoch.epoch) for epoch in fitted.epochs] == [("all", n) for n in range(4)]
    assert fitted.best_epoch == 3
    assert fitted.device == "cpu"


def test_a_backbone_that_stands_still_keeps_its_weights_and_batchnorm_statistics(tmp_path: Path) -> None:
    images, acute, patient = _cohort(12)
    inner = inner_fold(patient, acute, seed=2)
    settings = _settings(frozen_share=1, patience=9)

    fitted = fit_network(images, acute, patient, settings, seed=2, start=_start(), work=tmp_path)

    # the inner loss was measured on the living network, and here the one that it started from is put under the head
    expected = _loss(fitted, images[inner], acute[inner], class_weights(acute[~inner]))
    assert fitted.epochs[fitted.best_epoch].inner_loss == pytest.approx(expected, abs=1e-6)
    assert all(torch.equal(tensor, fitted.backbone[name]) for name, tensor in _start().items())
    assert np.abs(fitted.weight).max() > 0


def test_a_backbone_that_moves_changes_its_weights_and_batchnorm_statistics(tmp_path: Path) -> None:
    images, acute, patient = _cohort(8)
    start = _start()

    fitted = fit_network(images, acute, patient, _settings(epochs=2), seed=1, start=start, work=tmp_path)

    for name in ("conv1.weight", "layer4.0.bn2.weight", "layer4.0.bn2.running_mean"):
        assert not torch.equal(fitted.backbone[name], start[name]), name
    assert all(torch.equal(tensor, start[name]) for name, tensor in _start().items())


def test_each_class_weighs_the_same_and_a_row_one_on_average() -> None:
    acute = np.array([1, 1, 1, 0], dtype=np.int64)

    weights = class_weights(acute)

    assert weights == pytest.approx((2.0, 2 / 3))
    assert np.mean([weights[label] for label in acute]) == pytest.approx(1)


def test_the_head_goes_by_gradient_descent_with_momentum_and_weight_decay_at_the_rates_of_the_schedule(
    tmp_path: Path,
) -> None:
    images, acute, patient = _cohort(6)
    settings = _settings(epochs=3, batch=32, frozen_share=1, augmentation=False, weight_decay=0.01)
    fitted = fit_network(images, acute, patient, settings, seed=1, start=_start(), work=tmp_path)

    with torch.no_grad():
        features = fitted.network()(torch.from_numpy(images)[:, None]).double().numpy()
    inputs = np.hstack([features, np.ones((len(acute), 1))])
    share = np.array(class_weights(acute))[acute]
    share /= share.sum()
    head, momentum = np.zeros((2, inputs.shape[1])), np.zeros((2, inputs.shape[1]))
    for epoch in range(3):
        answers = np.exp(inputs @ head.T)
        wrong = answers / answers.sum(axis=1, keepdims=True) - np.eye(2)[acute]
        momentum = 0.9 * momentum + (wrong * share[:, None]).T @ inputs + 0.01 * head
        head = head - rates(epoch, settings)[0] * momentum

    expected = head[1] - head[0]
    assert fitted.weight == pytest.approx(expected[:-1], abs=1e-6)
    assert fitted.bias == pytest.approx(expected[-1], abs=1e-6)
    assert np.abs(expected).max() > 1e-2


def test_the_larger_class_does_not_win_where_the_pictures_say_nothing(tmp_path: Path) -> None:
    images = np.repeat(_cohort(1)[0][:1], 8, axis=0)
    acute = np.array([1, 1, 1, 1, 1, 1, 0, 0], dtype=np.int64)
    settings = _settings(augmentation=False, frozen_share=1)

    fitted = fit_network(images, acute, np.arange(8), settings, seed=1, start=_start(), work=tmp_path)

    assert abs(fitted.bias) < 1e-6
    assert np.abs(fitted.weight).max() < 1e-6


# -- learning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("permuted", [False, True])
def test_it_learns_a_plain_task_and_nothing_from_permuted_labels(permuted: bool, tmp_path: Path) -> None:
    images, acute, patient = _cohort(60)
    if permuted:
        acute = np.random.default_rng(3).permutation(acute)
    settings = _settings(epochs=6, batch=32, learning_rate=0.1, frozen_share=0.3, crossfit_folds=2)

    fitted = crossfit(images, acute, patient, settings, seed=3, start=_start(), work=tmp_path, features=_features)

    auc = roc_auc_score(acute, fitted.out_of_fold_logit)
    assert 0.3 < auc < 0.7 if permuted else auc > 0.8


def test_the_logit_of_the_exported_network_is_that_of_torch(tmp_path: Path) -> None:
    images, acute, patient = _cohort(8)
    fitted = fit_network(images, acute, patient, _settings(), seed=1, start=_start(), work=tmp_path)

    got = fitted.logit(_features(exported(fitted.network(), size=SIZE)[0], images))

    with torch.no_grad():
        features = fitted.network()(torch.from_numpy(images)[:, None]).double().numpy()
    assert got == pytest.approx(fitted.logit(features), abs=1e-4)
    assert got.std() > 1e-3


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(tmp_path: Path) -> None:
    cohort, settings = _cohort(8), _settings(epochs=2)

    first, again, other = (
        fit_network(*cohort, settings, seed=seed, start=_start(), work=tmp_path / folder)
        for folder, seed in (("a", 1), ("b", 1), ("c", 2))
    )

    assert _same(first, again)
    assert not _same(first, other)


# -- early stop --------------------------------------------------------------------------------------------------------


def test_the_early_stop_gives_back_the_weights_of_the_best_epoch(tmp_path: Path) -> None:
    images, acute, patient = _cohort(16, band=0.0)
    settings = _settings(epochs=20, frozen_share=0, patience=3, learning_rate=0.1)
    inner = inner_fold(patient, acute, seed=4)

    fitted = fit_network(images, acute, patient, settings, seed=4, start=_start(), work=tmp_path)

    losses = [epoch.inner_loss for epoch in fitted.epochs]
    assert len(losses) == fitted.best_epoch + 1 + 3 < 20
    assert fitted.best_epoch == int(np.argmin(losses))
    restored = _loss(fitted, images[inner], acute[inner], class_weights(acute[~inner]))
    assert restored == pytest.approx(losses[fitted.best_epoch], rel=1e-5)
    assert all(epoch.inner_auc is not None for epoch in fitted.epochs)


def test_epochs_of_a_standing_backbone_do_not_count_for_the_early_stop(tmp_path: Path) -> None:
    images, acute, patient = _cohort(16, band=0.0)
    settings = _settings(epochs=12, frozen_share=0.5, patience=1, learning_rate=0.5)

    fitted = fit_network(images, acute, patient, settings, seed=4, start=_start(), work=tmp_path)

    assert len(fitted.epochs) > 6


@examples(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=3), min_size=4, max_size=30),
    seed=st.integers(0, 2**31 - 1),
)
def test_an_inner_fold_is_of_whole_patients_with_both_classes_on_both_sides(labels: list[list[int]], seed: int) -> None:
    patient = np.repeat(np.arange(len(labels)), [len(one) for one in labels])
    acute = np.array([label for one in labels for label in one], dtype=np.int64)

    if min(len(set(patient[acute == kind])) for kind in (0, 1)) < 2:
        with pytest.raises(FractureSweepError, match=r"network\.patience"):
            inner_fold(patient, acute, seed=seed)
        return
    with suppress(FractureSweepError):  # a few patients with both classes may allow none
        inner = inner_fold(patient, acute, seed=seed)

        assert not set(patient[inner]) & set(patient[~inner])
        assert set(acute[inner]) == set(acute[~inner]) == {0, 1}


# -- crossfit ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folded() -> tuple[Arrays, np.ndarray]:
    cohort = _cohort(7)
    return cohort, fold_numbers(cohort[2], cohort[1], 2, seed=1)


def test_no_logit_comes_from_a_network_that_saw_the_patient(folded: tuple[Arrays, np.ndarray], tmp_path: Path) -> None:
    (images, acute, patient), fold = folded
    counts = np.bincount(patient)
    someone = int(np.flatnonzero(counts >= 2)[0])
    rows = np.flatnonzero(patient == someone)
    settings = _settings(epochs=2)
    other_labels, other_picture = acute.copy(), images.copy()
    other_labels[rows] = 1 - other_labels[rows]
    other_picture[rows[0]] = np.random.default_rng(9).standard_normal((SIZE, SIZE)).astype(np.float32)

    plain, labelled, pictured = (
        crossfit(
            *cohort, settings, seed=1, start=_start(), work=tmp_path / str(n), features=_features, fold=fold
        ).out_of_fold_logit
        for n, cohort in enumerate(
            [(images, acute, patient), (images, other_labels, patient), (other_picture, acute, patient)]
        )
    )

    own, others = fold == fold[rows[0]], fold != fold[rows[0]]
    assert np.array_equal(plain[own], labelled[own])
    assert np.array_equal(plain[rows[1:]], pictured[rows[1:]])
    assert not np.isclose(plain[others], labelled[others]).all()
    assert not np.isclose(plain[others], pictured[others]).all()


def test_crossfit_tells_all_curves_and_goes_on_where_it_was_interrupted(
    folded: tuple[Arrays, np.ndarray], tmp_path: Path
) -> None:
    cohort, fold = folded
    settings = _settings(epochs=2, storage="int8")
    told: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        told.append((done, total))
        if done == 3:
            raise KeyboardInterrupt

    whole = crossfit(
        *cohort, settings, seed=1, start=_start(), work=tmp_path / "whole", features=_features, fold=fold,
        checkpoint_seconds=0,
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        crossfit(
            *cohort, settings, seed=1, start=_start(), work=tmp_path / "parts", features=_features, fold=fold,
            progress=stop, checkpoint_seconds=0,
        )  # fmt: skip
    resumed = crossfit(
        *cohort, settings, seed=1, start=_start(), work=tmp_path / "parts", features=_features, fold=fold,
    )  # fmt: skip

    assert told == [(1, 6), (2, 6), (2, 6), (3, 6)]
    assert [(epoch.fold, epoch.epoch) for epoch in resumed.epochs] == [
        (f, n) for f in ("1", "2", "all") for n in (0, 1)
    ]
    assert np.array_equal(resumed.out_of_fold_logit, whole.out_of_fold_logit)
    assert np.isfinite(whole.out_of_fold_logit).all()
    assert _same(resumed.final, whole.final)
    assert whole.onnx_largest_difference < 1e-4


@examples(max_examples=40, deadline=None)
@given(patients=st.integers(10, 40), folds=st.integers(2, 5), seed=st.integers(0, 2**31 - 1))
def test_folds_are_of_whole_patients_and_none_is_empty(patients: int, folds: int, seed: int) -> None:
    _, acute, patient = _cohort(patients)

    fold = fold_numbers(patient, acute, folds, seed=seed)

    assert set(fold) == set(range(1, folds + 1))
    assert all(len(set(fold[patient == one])) == 1 for one in set(patient))


def test_folds_that_cut_a_patient_are_refused(folded: tuple[Arrays, np.ndarray], tmp_path: Path) -> None:
    cohort, fold = folded
    twice = int(np.flatnonzero(np.bincount(cohort[2]) >= 2)[0])
    fold[np.flatnonzero(cohort[2] == twice)[0]] = 3

    with pytest.raises(ValueError, match="a patient lies in two folds"):
        crossfit(*cohort, _settings(), seed=1, start=_start(), work=tmp_path, features=_features, fold=fold)


# -- interruption ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[int | None, FittedNetwork]:
    """By patience: what training gives that nothing interrupts."""
    work = tmp_path_factory.mktemp("unbroken")
    return {
        patience: fit_network(
            *_cohort(9), _settings(epochs=5, patience=patience), seed=1, start=_start(), work=work / str(patience)
        )
        for patience in (None, 3)
    }


@pytest.mark.parametrize(("last", "patience"), [(1, 3), (2, 3), (3, 3), (4, 3), (5, 3), (1, None), (4, None)])
def test_a_run_interrupted_after_any_epoch_ends_with_the_same_bits(
    last: int, patience: int | None, unbroken: dict[int | None, FittedNetwork], tmp_path: Path
) -> None:
    cohort, settings, whole = _cohort(9), _settings(epochs=5, patience=patience), unbroken[patience]

    def stop(done: int, _: int) -> None:
        if done == last:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_network(*cohort, settings, seed=1, start=_start(), work=tmp_path, progress=stop, checkpoint_seconds=0)
    seen: list[int] = []
    resumed = fit_network(
        *cohort, settings, seed=1, start=_start(), work=tmp_path, progress=lambda done, _: seen.append(done)
    )

    assert seen[0] == min(last, 4) + 1
    assert _same(resumed, whole)
    assert resumed.best_epoch == whole.best_epoch


def test_an_interruption_does_not_forget_which_epoch_was_the_best(tmp_path: Path) -> None:
    cohort = _cohort(16, band=0.0)
    settings = _settings(epochs=20, frozen_share=0, patience=3, learning_rate=0.1)
    whole = fit_network(*cohort, settings, seed=4, start=_start(), work=tmp_path / "whole")

    def stop(done: int, _: int) -> None:
        if done == whole.best_epoch + 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_network(
            *cohort, settings, seed=4, start=_start(), work=tmp_path / "parts", progress=stop, checkpoint_seconds=0
        )
    resumed = fit_network(*cohort, settings, seed=4, start=_start(), work=tmp_path / "parts")

    assert resumed.best_epoch == whole.best_epoch
    assert _same(resumed, whole)


def test_a_finished_fit_is_read_and_not_made_again(tmp_path: Path) -> None:
    cohort, settings = _cohort(8), _settings(epochs=2)
    first = fit_network(*cohort, settings, seed=1, start=_start(), work=tmp_path)
    told: list[int] = []

    again = fit_network(
        *cohort, settings, seed=1, start=_start(), work=tmp_path, progress=lambda done, _: told.append(done)
    )

    assert told == []
    assert _same(first, again)
    assert [path.name for path in tmp_path.rglob("*.safetensors")] == ["fitted.safetensors"]


@pytest.mark.parametrize("changed", ["labels", "pictures", "patients", "settings", "start"])
def test_what_a_fit_depends_on_is_never_taken_from_another_fit(changed: str, tmp_path: Path) -> None:
    images, acute, patient = _cohort(8)
    settings, start = _settings(epochs=1), _start()
    fit_network(images, acute, patient, settings, seed=1, start=start, work=tmp_path)
    if changed == "labels":
        acute = 1 - acute
    elif changed == "pictures":
        images = images[:, ::-1].copy()
    elif changed == "patients":
        patient = patient[::-1].copy()
    elif changed == "settings":
        settings = _settings(epochs=1, momentum=0.5)
    else:
        start = _start(2)
    told: list[int] = []

    fit_network(
        images, acute, patient, settings, seed=1, start=start, work=tmp_path, progress=lambda done, _: told.append(done)
    )

    assert told == [1]


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_one_class_alone_is_refused(tmp_path: Path) -> None:
    images, acute, patient = _cohort(4)

    with pytest.raises(FractureSweepError, match="has one class alone"):
        fit_network(images, np.zeros_like(acute), patient, _settings(), seed=1, start=_start(), work=tmp_path)


def test_too_few_patients_for_the_inner_fold_are_counted(tmp_path: Path) -> None:
    images, _, _ = _cohort(4)
    acute, patient = np.array([1, 0, 0, 0]), np.arange(4)

    with pytest.raises(FractureSweepError, match=r"early stop needs .* there are 1 with acute and 3 with chronic"):
        fit_network(images[:4], acute, patient, _settings(patience=2), seed=1, start=_start(), work=tmp_path)


def test_too_few_patients_for_the_folds_are_counted(tmp_path: Path) -> None:
    images, _, _ = _cohort(6)
    acute, patient = np.array([1, 1, 0, 0, 0, 0]), np.arange(6)

    with pytest.raises(FractureSweepError, match=r"crossfit needs 5 patients of each class.* 2 with acute and 4 with"):
        crossfit(images[:6], acute, patient, _settings(), seed=1, start=_start(), work=tmp_path, features=_features)


def test_pictures_with_something_that_is_no_number_are_refused(tmp_path: Path) -> None:
    images, acute, patient = _cohort(4)
    images[0, 0, 0] = np.nan

    with pytest.raises(ValueError, match="no number"):
        fit_network(images, acute, patient, _settings(), seed=1, start=_start(), work=tmp_path)


def test_a_training_that_diverges_says_so(tmp_path: Path) -> None:
    cohort = _cohort(8)

    with pytest.raises(FractureSweepError, match=r"diverged in epoch .* lower network\.learning_rate"):
        fit_network(*cohort, _settings(learning_rate=1e30), seed=1, start=_start(), work=tmp_path)


def test_settings_that_want_cuda_without_cuda_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    with pytest.raises(FractureSweepError, match="finds no CUDA device"):
        fit_network(*_cohort(4), _settings(device="cuda"), seed=1, start=_start(), work=tmp_path)


@given(rows=st.integers(2, 200), size=st.integers(2, 40))
def test_batches_hold_every_row_once_and_never_one_alone(rows: int, size: int) -> None:
    order = np.random.default_rng(rows).permutation(rows)

    found = batches(order, size)

    assert np.array_equal(np.concatenate(found), order)
    assert all(2 <= len(batch) <= size + 1 for batch in found)
    assert all(len(batch) == size for batch in found[:-1])
