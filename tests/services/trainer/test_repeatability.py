from dataclasses import replace

import numpy as np
import pytest

from services.trainer.cohort_table import CohortTable, Repeat, TooSmall
from services.trainer.repeatability import repeatability
from services.trainer.settings import RepeatabilitySettings
from tests.fixtures.training_cohorts import FEATURES, drawn_table

SETTINGS = RepeatabilitySettings()


def training(**second: np.ndarray) -> CohortTable:
    """Drawn rows, each reading of the first twelve given."""
    table = drawn_table(repeats=False)
    rows = np.arange(12, dtype=np.int64)
    return replace(table, repeats={name: Repeat(rows=rows, hcr=hcr) for name, hcr in second.items()})  # type: ignore[misc]


def test_a_feature_that_one_of_two_readers_does_not_give_again_goes() -> None:
    first = drawn_table(repeats=False).hcr[:12]
    other = first.copy()
    other[:, 5] = other[::-1, 5]

    found = repeatability(training(intra=first.copy(), inter=other), SETTINGS)

    assert set(found.features) - set(found.kept) == {FEATURES[5]}
    assert found.method == "masks"
    assert found.cases == {"inter": 12, "intra": 12}


def test_a_reader_who_draws_everything_larger_does_not_agree() -> None:
    first = drawn_table(repeats=False).hcr[:12]
    other = first + 3 * first.std(axis=0)

    with pytest.raises(TooSmall, match=r"an ICC of 0\.8, and there is none"):
        repeatability(training(inter=other), SETTINGS)


def test_a_feature_that_is_the_same_in_all_readings_cannot_be_judged_and_goes() -> None:
    table = training(intra=drawn_table(repeats=False).hcr[:12].copy())
    table.hcr[:12, 9] = 4.0
    table.repeats["intra"].hcr[:, 9] = 4.0

    found = repeatability(table, SETTINGS)

    assert FEATURES[9] not in found.kept
    assert found.intra[9] is None
    assert found.inter == ()


def test_perturbed_masks_are_called_so() -> None:
    table = replace(training(intra=drawn_table(repeats=False).hcr[:12].copy()), perturbed=True)

    assert repeatability(table, SETTINGS).method == "perturbation"


def test_without_repeats_or_when_not_asked_every_feature_stays_and_it_is_said() -> None:
    given = training(intra=drawn_table(repeats=False).hcr[:12].copy())

    for table, settings in ((training(), SETTINGS), (given, RepeatabilitySettings(method="none"))):
        found = repeatability(table, settings)

        assert found.method == "none"
        assert found.kept == FEATURES


def test_too_few_repeats_say_what_is_needed() -> None:
    table = training(intra=drawn_table(repeats=False).hcr[:12].copy())
    few = replace(table.repeats["intra"], rows=table.repeats["intra"].rows[:4], hcr=table.repeats["intra"].hcr[:4])

    with pytest.raises(TooSmall, match="needs 5 training rows with a repeated mask, and there is 4"):
        repeatability(replace(table, repeats={"intra": few}), SETTINGS)
