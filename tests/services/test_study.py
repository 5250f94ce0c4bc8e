"""The rows and the table of `make study`, from runs that are drawn."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.study import MODES, Mode, StudyRow, moved, read_rows, rows_of, table, write_rows
from services.trainer.results import MODELS
from tests.fixtures.run_results import full_result

GOOD = {"radiomics": 0.85, "dlr": 0.85, "fusion": 0.86, "dlrn": 0.9}


def run(seed: int, mode: Mode, **held_out: float) -> list[StudyRow]:
    """The rows of a run whose models have these held-out AUCs."""
    return [
        StudyRow(
            seed=seed, mode=mode, model=model, patients=365, in_sample=0.99, out_of_fold=0.85, held_out=held_out[model],
            held_out_low=0.5, held_out_high=1.0, random_out_of_fold=0.7, random_held_out=0.70 + seed / 100,
            networks=0 if mode == "frozen" else 6, moved=2, weights="drawn", minutes=1.5, cores=2,
        )
        for model in MODELS
    ]  # fmt: skip


def test_each_mode_and_model_has_its_mean_interval_and_range() -> None:
    low = {"radiomics": 0.80, "dlr": 0.81, "fusion": 0.82, "dlrn": 0.83}
    high = {"radiomics": 0.90, "dlr": 0.85, "fusion": 0.88, "dlrn": 0.87}

    text = table([row for mode in MODES for seed, of in ((1, low), (2, high)) for row in run(seed, mode, **of)])

    # two seeds: 12.706 standard errors of .05
    interval = "0.850 (0.215 to 1.485)"
    for mode in MODES:
        assert f"| `{mode}` | Radiomics | 2 | 0.990 (0.990 to 0.990) | 0.850 (0.850 to 0.850) | {interval} | " in text
    assert "| random network | DLR | 2 | | 0.700 (0.700 to 0.700) | 0.715 (0.651 to 0.779) | 0.710 to 0.720 |" in text
    assert "seeds 1, 2" in text
    assert "PHANTOMS" in text


def test_the_limits_of_the_method_are_judged() -> None:
    held = table(run(1, "frozen", **GOOD))
    missed = table(run(1, "frozen", radiomics=0.95, dlr=0.70, fusion=0.80, dlrn=0.9))

    assert "`frozen`, Radiomics: 0.850, within 0.80 to 0.90." in held
    assert "not below 0.850 by more than .01: holds." in held
    assert "`frozen`, Radiomics: 0.950, OUTSIDE 0.80 to 0.90." in missed
    assert "not below 0.950 by more than .01: does NOT hold." in missed


def test_crossfit_is_compared_with_frozen_seed_by_seed() -> None:
    better = {model: value + 0.02 for model, value in GOOD.items()}
    rows = [*run(1, "frozen", **GOOD), *run(2, "frozen", **GOOD), *run(1, "crossfit", **better)]

    text = table(rows)

    assert "- DLR, `crossfit` minus `frozen`, held out, 1 seeds: 0.020." in text
    assert "minus" not in table(run(1, "frozen", **GOOD))


def test_it_is_said_how_often_the_early_stop_let_the_backbone_move() -> None:
    text = table([*run(1, "frozen", **GOOD), *run(1, "crossfit", **GOOD), *run(2, "crossfit", **GOOD)])

    assert "- `crossfit`: 4 of 12 fine-tuned networks have weights of an epoch in which the backbone had moved." in text
    assert "- `frozen`: " not in text.split("minus")[-1]

    network = full_result().network
    folds = {one.fold for one in network.epochs}
    to_the_end = network.model_copy(
        update={"epochs": tuple(one.model_copy(update={"inner_loss": None}) for one in network.epochs)}
    )
    assert moved(network)[0] == moved(to_the_end)[0] == len(folds)
    assert moved(to_the_end)[1] == len(folds)  # the last epoch's


def test_rows_are_written_in_order_and_read_again(tmp_path: Path) -> None:
    rows = [*run(2, "crossfit", **GOOD), *run(1, "frozen", **GOOD)]

    write_rows(tmp_path / "study.csv", rows)

    found = read_rows(tmp_path / "study.csv")
    assert [(row.seed, row.mode) for row in found[::4]] == [(1, "frozen"), (2, "crossfit")]
    assert sorted(found, key=repr) == sorted(rows, key=repr)
    assert read_rows(tmp_path / "none.csv") == ()


def test_the_page_shows_the_table_of_its_rows() -> None:
    docs = Path(__file__).resolve().parents[2] / "docs"

    assert table(read_rows(docs / "study.csv")) in (docs / "study.md").read_text(encoding="utf-8")


def test_a_run_gives_a_row_a_model_with_its_interval() -> None:
    result = full_result()

    rows = rows_of(result, seed=7, mode="crossfit", patients=365, cores=2)

    assert [row.model for row in rows] == list(MODELS)
    auc = result.scored("fusion", "test").auc()
    assert auc is not None
    assert rows[2].held_out == pytest.approx(auc.value, abs=1e-6)
    assert (rows[2].held_out_low, rows[2].held_out_high) == pytest.approx((auc.low, auc.high), abs=1e-6)
    assert rows[2].random_held_out == 0.702
    assert rows[2].minutes == round(sum(result.seconds.values()) / 60, 1)
    with pytest.raises(ValueError, match="random network beside it"):
        rows_of(result.model_copy(update={"random_network": None}), seed=7, mode="crossfit", patients=365, cores=2)
