"""All figures of a run: they draw whatever a run found, mark phantoms, ask no host, and repeat to the byte."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from services.trainer.figures.catalogue import run_figures, write_figures
from services.trainer.figures.run_figure import RenderedFigure
from services.trainer.figures.style import PHANTOM_MARK
from tests.fixtures.run_results import VARIANTS, drawn, full_result, make_result

EVERY = {
    "training-curves",
    "feature-counts",
    "icc",
    *(
        f"{name}-{branch}"
        for branch in ("hcr", "dtl", "fusion")
        for name in ("spearman", "lasso-path", "lasso-error", "importance", "stability")
    ),
    "roc",
    "calibration",
    "decision-curves",
    "nomogram",
    "conformal-sets",
}
ABSENT = {
    "no test part, perturbed masks": set(),
    "no repeats, frozen network, fallback": {"icc", "training-curves"},
    "one feature": {"spearman-hcr", "spearman-dtl", "spearman-fusion", "stability-hcr"},
}


def words(figure: RenderedFigure) -> str:
    root = ElementTree.fromstring(figure.svg)
    return " ".join("".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text"))


def test_a_full_run_has_every_figure() -> None:
    assert set(drawn()) == EVERY


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_figure_is_drawn_or_says_why_it_is_not(variant: str) -> None:
    figures = run_figures(VARIANTS[variant]())

    absent = {figure.name: figure.data.absent for figure in figures if figure.data.absent}

    assert {figure.name for figure in figures} == EVERY
    assert set(absent) == ABSENT[variant]
    assert all(len(reason.split()) > 4 for reason in absent.values())
    assert set(drawn(variant)) == EVERY - ABSENT[variant]


@pytest.mark.parametrize("name", sorted(EVERY))
def test_each_figure_of_phantoms_says_so_and_stands_alone(name: str) -> None:
    figure = drawn()[name]

    addresses = re.findall(r'(?:href|src)="([^"]*)"|url\(([^)]*)\)', figure.svg)

    assert PHANTOM_MARK in words(figure)
    assert all((a or b).startswith((f"#{name}-", "data:image/png;base64,")) for a, b in addresses)
    assert "<metadata" not in figure.svg
    assert "<script" not in figure.svg


def test_a_run_on_patients_is_not_called_phantom() -> None:
    for figure in drawn("no repeats, frozen network, fallback").values():
        assert "phantom" not in words(figure).lower()


def test_ids_of_all_figures_differ_so_that_one_page_can_hold_them() -> None:
    ids = [found for figure in drawn().values() for found in re.findall(r'\bid="([^"]*)"', figure.svg)]

    assert len(ids) > 1000
    assert len(set(ids)) == len(ids)


def test_the_same_run_is_drawn_to_the_same_bytes_whatever_was_drawn_before(tmp_path: Path) -> None:
    chosen = ("lasso-path-fusion", "nomogram", "conformal-sets")
    figures = tuple(figure for figure in run_figures(full_result()) if figure.name in chosen)

    first = write_figures(figures, tmp_path / "first")
    second = write_figures(figures[::-1], tmp_path / "second")

    files = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert files == sorted(f"{name}.{kind}" for name in chosen for kind in ("csv", "png", "svg"))
    for name in files:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    assert [figure.svg for figure in first] == [drawn()[figure.figure.name].svg for figure in first]
    assert all(figure.png.startswith(b"\x89PNG") for figure in second)


def test_what_has_nothing_to_draw_is_not_drawn_blank() -> None:
    figure = next(figure for figure in run_figures(make_result(patients=40, folds=())) if figure.data.absent)

    with pytest.raises(ValueError, match="training-curves cannot be drawn: the network was not fine-tuned"):
        figure.rendered()
