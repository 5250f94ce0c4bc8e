"""The table of `make study`, from runs that are drawn."""

from __future__ import annotations

from services.study import MODES, table
from services.trainer.results import MODELS, Optimism, RunResult
from tests.fixtures.run_results import full_result


def run(**held_out: float) -> RunResult:
    """A run whose models have these held-out AUCs."""
    optimism = tuple(
        Optimism(model=model, in_sample=0.99, out_of_fold=0.85, held_out=held_out[model]) for model in MODELS
    )
    return full_result().model_copy(update={"optimism": optimism})


def test_each_mode_and_model_has_its_mean_spread_and_range() -> None:
    low = run(radiomics=0.80, dlr=0.81, fusion=0.82, dlrn=0.83)
    high = run(radiomics=0.90, dlr=0.85, fusion=0.88, dlrn=0.87)

    text = table({(seed, mode): one for mode in MODES for seed, one in ((1, low), (2, high))})

    for mode in MODES:
        assert f"| `{mode}` | Radiomics | 0.990 | 0.850 | 0.850 (0.071) | 0.800 to 0.900 |" in text
    assert "2 seeds (1, 2)" in text
    assert "PHANTOMS" in text


def test_the_limits_of_the_method_are_judged() -> None:
    good = run(radiomics=0.85, dlr=0.85, fusion=0.86, dlrn=0.9)
    bad = run(radiomics=0.95, dlr=0.70, fusion=0.80, dlrn=0.9)

    held = table({(1, "frozen"): good})
    missed = table({(1, "frozen"): bad})

    assert "`frozen`, Radiomics: 0.850, within 0.80 to 0.90." in held
    assert "not below 0.850 by more than .01: holds." in held
    assert "`frozen`, Radiomics: 0.950, OUTSIDE 0.80 to 0.90." in missed
    assert "not below 0.950 by more than .01: does NOT hold." in missed


def test_a_study_that_is_not_through_shows_what_there_is() -> None:
    text = table({(3, "crossfit"): run(radiomics=0.85, dlr=0.85, fusion=0.86, dlrn=0.9)})

    assert "`crossfit`" in text
    assert "`frozen`" not in text
