from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from services.trainer.figures.run_figure import RunFigure
from services.trainer.segmentation.anatomy import Anatomy, anatomy_of_vertebrae
from services.trainer.segmentation.compression import Compression
from services.trainer.segmentation.judging import (
    JudgedBody,
    draw_losses,
    judged_bodies,
    loss_data,
    summaries,
    true_heights,
)
from services.trainer.segmentation.known_loss import (
    GRID_MM,
    KnownBody,
    KnownScan,
    lost_in_the_middle,
    scans_of_anatomy,
    scans_of_phantom,
    unbroken,
)
from shared.fracture.levels import VERSE
from shared.fracture.spine.record import Banded, Finding
from shared.fracture.volume import Geometry, Mask, Volume
from tests.fixtures.spines import DrawnBody, draw_spine

LABELS = {level: value for value, level in VERSE.items()}
LEVELS = ("L1", "L2", "L3", "L4")
GEOMETRY = Geometry(
    shape_zyx=(40, 8, 8),
    spacing_zyx=(1.0, 1.0, 1.0),
    origin_zyx=(0.0, 0.0, 0.0),
    direction_zyx=((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
)


def boxes(*places: tuple[int, int, int]) -> Mask:
    """(first slice, last slice, value)."""
    voxels = np.zeros(GEOMETRY.shape_zyx, dtype=np.uint8)
    for low, high, value in places:
        voxels[low:high, 2:6, 2:6] = value
    return Mask(voxels=voxels, geometry=GEOMETRY)


def known(*bodies: tuple[str, int, float]) -> KnownScan:
    """Four boxes of eight slices, from below, with their labels and losses."""
    truth = boxes(*((2 + 10 * n, 10 + 10 * n, label) for n, (_, label, _) in enumerate(bodies)))
    return KnownScan(
        origin="drawn",
        number=0,
        slice_mm=1.0,
        volume=Volume(voxels=np.zeros(GEOMETRY.shape_zyx, dtype=np.int16), geometry=GEOMETRY),
        truth=truth,
        bodies=tuple(
            KnownBody(level=level, label=label, loss=loss, deformity="wedge" if loss else None)
            for level, label, loss in bodies
        ),
    )


def finding(level: str, *, loss: float = 0.0, decision: str = "not-fractured") -> Finding:
    height = Banded(value=25.0, low=24.5, high=25.5)
    return Finding(
        level=level,
        centre_zyx=(0.0, 0.0, 0.0),
        volume_ml=20.0,
        anterior_mm=height,
        middle_mm=height,
        posterior_mm=height,
        loss=Banded(value=loss, low=loss - 0.02, high=loss + 0.02),
        decision=decision,  # type: ignore[arg-type]
        reason="drawn",
    )


FOUR = known(("L4", 23, 0.4), ("L3", 22, 0.0), ("L2", 21, 0.25), ("L1", 20, 0.5))


def test_bodies_are_matched_by_what_covers_them_and_not_by_their_names() -> None:
    labels = boxes((2, 10, 101), (13, 20, 102), (22, 27, 103), (32, 40, 104))
    findings = [finding("B01", loss=0.38, decision="fractured"), finding("B02"), finding("B03"), finding("B04")]

    rows = judged_bodies(
        FOUR,
        labels=labels,
        findings=findings,
        values={f"B0{n}": 100 + n for n in range(1, 5)},
        true_heights={23: (25.0, 24.0, 25.5)},
    )

    assert [(row.level, row.named, row.fate) for row in rows] == [
        ("L4", "B01", "found"),
        ("L3", "B02", "found"),
        ("L2", "B03", "found"),
        ("L1", "B04", "found"),
    ]
    assert rows[0].called
    assert rows[0].dice == 1.0
    assert rows[1].dice == pytest.approx(2 * 7 / 15, abs=1e-3)


def test_a_body_that_nothing_covers_is_missed_and_two_under_one_label_are_merged() -> None:
    labels = boxes((2, 20, 101), (22, 25, 103))  # two in one; a third of the third; nothing of the fourth

    rows = judged_bodies(
        FOUR, labels=labels, findings=[finding("B01"), finding("B03")], values={"B01": 101, "B03": 103}, true_heights={}
    )

    assert [row.fate for row in rows] == ["merged", "merged", "missed", "missed"]
    assert not any(row.called for row in rows)


def test_a_scan_in_which_nothing_was_found_misses_every_body() -> None:
    rows = judged_bodies(FOUR, labels=None, findings=(), values={}, true_heights={})

    assert [row.fate for row in rows] == ["missed"] * 4


def body(loss: float, decision: str, *, fate: str = "found", slice_mm: float = 1.0) -> JudgedBody:
    return JudgedBody(
        origin="drawn",
        scan=0,
        slice_mm=slice_mm,
        level="L1",
        deformity="wedge",
        true_loss=loss,
        fate=fate,  # type: ignore[arg-type]
        dice=0.9 if fate == "found" else None,
        loss=loss if fate == "found" else None,
        decision=decision,
        true_heights=(20.0, 22.0, 25.0),
        heights=(21.0, 22.5, 24.0) if fate == "found" else None,
    )


def test_what_is_missed_or_sent_to_a_person_is_not_called() -> None:
    rows = [
        body(0.45, "fractured"),
        body(0.35, "review"),
        body(0.31, "", fate="missed"),
        body(0.30, "fractured"),
        body(0.25, "fractured"),
        body(0.20, "not-fractured"),
        body(0.0, "fractured"),
        body(0.05, "review"),
        body(0.5, "fractured", slice_mm=3.0),
    ]

    thin, thick = summaries(rows)

    assert (thin.sensitivity.count, thin.sensitivity.of) == (2, 4)
    assert (thin.specificity.count, thin.specificity.of) == (2, 3)
    assert (thin.between.count, thin.between.of) == (1, 1)
    assert (thin.missed.count, thin.review.count) == (1, 2)
    assert thin.sensitivity.low is not None
    assert thin.sensitivity.low < 0.5 < (thin.sensitivity.high or 0)
    assert [(error.height, error.bodies, error.mean) for error in thin.errors] == [
        ("anterior", 7, 1.0),
        ("middle", 7, 0.5),
        ("posterior", 7, -1.0),
    ]
    assert (thick.slice_mm, thick.specificity.of, thick.specificity.value) == (3.0, 0, None)


def test_the_picture_has_a_panel_a_thickness_and_says_that_it_is_synthetic() -> None:
    rows = [body(0.4, "fractured"), body(0.1, "not-fractured"), body(0.4, "fractured", slice_mm=3.0)]

    drawn = RunFigure(
        name="losses", title="t", caption="c", section="performance", data=loss_data(rows), draw=draw_losses,
        phantom=True,
    ).rendered()  # fmt: skip

    assert "PHANTOM DATA" in drawn.svg
    assert "1 mm slices" in drawn.svg
    assert "3 mm slices" in drawn.svg
    assert len(drawn.csv.splitlines()) == 4
    assert loss_data([body(0.4, "", fate="missed")]).absent


# the scans ----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def spine(tmp_path_factory: pytest.TempPathFactory) -> tuple[Anatomy, Path]:
    """A drawn spine as a label map of whole vertebrae, T12 to L4."""
    drawn = draw_spine([DrawnBody()] * 5, spacing_zyx=(1.0, 1.0, 1.0), bend_degrees=2)
    table = np.array([0, *(LABELS[level] for level in ("T12", *LEVELS))], dtype=np.uint8)
    path = tmp_path_factory.mktemp("spine") / "drawn.nii.gz"
    image = sitk.GetImageFromArray(table[drawn.whole])
    image.SetDirection((1, 0, 0, 0, 1, 0, 0, 0, 1))
    sitk.WriteImage(image, str(path))
    geometry = Geometry(
        shape_zyx=drawn.whole.shape,  # type: ignore[arg-type]
        spacing_zyx=(1.0, 1.0, 1.0),
        origin_zyx=(0.0, 0.0, 0.0),
        direction_zyx=((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
    )
    labels = Mask(voxels=table[drawn.whole], geometry=geometry)
    return anatomy_of_vertebrae(labels, VERSE, name="drawn", spacing_mm=GRID_MM), path


def test_scans_of_an_anatomy_show_its_known_losses_at_every_thickness(spine: tuple[Anatomy, Path]) -> None:
    anatomy, _ = spine

    thin, thick = list(scans_of_anatomy(anatomy, seed=4, number=1, slices_mm=(0.7, 3.0)))
    (again, *_) = list(scans_of_anatomy(anatomy, seed=4, number=1, slices_mm=(0.7,)))

    assert np.array_equal(thin.volume.voxels, again.volume.voxels)
    assert thin.bodies == thick.bodies
    assert thick.volume.geometry.spacing_zyx[0] == pytest.approx(3.0)
    assert thin.truth.geometry.same_grid(thin.volume.geometry)
    heights = true_heights(thin)
    intact = [heights[one.label] for one in thin.bodies if not one.loss]
    for one in thin.bodies:
        if one.loss > 0.15 and intact:
            expected = float(np.median([posterior for _, _, posterior in intact]))
            assert 1 - min(heights[one.label]) / expected == pytest.approx(one.loss, abs=0.12)
    assert {one.label for one in thin.bodies} <= set(np.unique(thin.truth.voxels).tolist())


def test_the_longest_run_without_a_gap_is_what_is_judged(spine: tuple[Anatomy, Path]) -> None:
    anatomy, _ = spine
    bodies = {one.level: one for one in anatomy.bodies}
    gap = Anatomy(
        name="gap",
        spacing_mm=anatomy.spacing_mm,
        tissue=anatomy.tissue,
        vertebra=anatomy.vertebra,
        bodies=tuple(bodies[level] for level in ("T12", "L2", "L3", "L4")),
    )

    assert [one.level for one in unbroken(gap)] == ["L2", "L3", "L4"]
    assert len(unbroken(anatomy)) == len(anatomy.bodies) == 5


def test_the_true_loss_is_what_the_central_half_has_lost(spine: tuple[Anatomy, Path]) -> None:
    (one, *_) = spine[0].bodies

    assert lost_in_the_middle(Compression(body=one, deformity="wedge", loss=0.4)) == pytest.approx(0.4)
    aside = lost_in_the_middle(Compression(body=one, deformity="wedge", loss=0.4, side=1.0))
    assert 0.3 < aside < 0.4
    assert lost_in_the_middle(Compression(body=one, deformity="biconcave", loss=0.4)) == pytest.approx(0.37, abs=0.01)


def test_phantoms_of_known_loss_hold_nine_bodies_and_read_as_drawn() -> None:
    (scan,) = scans_of_phantom(seed=9, number=1, slices_mm=(1.5,))

    heights = true_heights(scan)

    assert [one.level for one in scan.bodies] == ["T9", "T10", "T11", "T12", "L1", "L2", "L3", "L4", "L5"]
    lost = [one for one in scan.bodies if one.loss > 0.2]
    assert lost
    for one in lost:
        anterior, middle, posterior = heights[one.label]
        assert min(anterior, middle, posterior) < 24
