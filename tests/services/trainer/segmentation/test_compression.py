from __future__ import annotations

import numpy as np
import pytest

from services.trainer.segmentation.anatomy import Anatomy
from services.trainer.segmentation.compression import DEFORMITIES, Compression, loss_at, moved_back
from services.trainer.segmentation.synthesis import Pose, places, taken
from services.trainer.segmentation.tissues import CODE
from shared.fracture.levels import ORDER
from shared.fracture.spine.chain import from_bodies, measured_chain
from shared.fracture.spine.grading import graded, losses

SHAPE = (170, 90, 60)


def compressed(anatomy: Anatomy, *compressions: Compression) -> np.ndarray:
    """The map of bodies by vertebra after the fractures, without any other change."""
    middle = np.array([body.frame.centre_zyx for body in anatomy.bodies]).mean(axis=0)
    pose = Pose(centre_zyx=middle, matrix=np.eye(3), elastic_mm=0.0)
    points = places(SHAPE, pose, compressions, np.random.default_rng(1))
    body = taken(anatomy.tissue, points, SHAPE, spacing_mm=anatomy.spacing_mm) == CODE["body"]
    return np.where(body, taken(anatomy.vertebra, points, SHAPE, spacing_mm=anatomy.spacing_mm), 0)


def chain(labels: np.ndarray, anatomy: Anatomy):
    values = [ORDER.index(body.level) + 1 for body in anatomy.bodies]
    return measured_chain(from_bodies(labels, values, spacing_zyx=(1.5, 1.5, 1.5))[0])


@pytest.mark.parametrize("deformity", DEFORMITIES)
@pytest.mark.parametrize("loss", [0.25, 0.45])
def test_a_body_loses_what_it_is_told_to_and_its_neighbours_nothing(anatomy: Anatomy, deformity, loss: float) -> None:
    before = chain(compressed(anatomy), anatomy)
    fracture = Compression(body=anatomy.bodies[2], deformity=deformity, loss=loss, upper_share=1.0)

    after = chain(compressed(anatomy, fracture), anatomy)

    found = graded([vertebra.chain_body() for vertebra in after])
    assert found[2] is not None
    assert found[2].loss.value == pytest.approx(loss, abs=0.06)
    for n in (0, 1, 3, 4, 5):
        was, now = before[n].measured, after[n].measured
        assert was is not None
        assert now is not None
        assert now.heights.posterior == pytest.approx(was.heights.posterior, abs=1.0)
        assert losses(now.heights, expected_mm=None).within < 0.12


def test_the_neighbour_above_comes_down_by_the_mean_loss(anatomy: Anatomy) -> None:
    fracture = Compression(body=anatomy.bodies[2], deformity="crush", loss=0.5, upper_share=1.0)

    before, after = compressed(anatomy), compressed(anatomy, fracture)

    def height_of(labels: np.ndarray, n: int) -> float:
        return float(np.argwhere(labels == ORDER.index(anatomy.bodies[n].level) + 1)[:, 0].mean() * 1.5)

    fell = height_of(before, 1) - height_of(after, 1)
    assert fell == pytest.approx(0.5 * 0.92 * anatomy.bodies[2].height_mm, abs=1.5)
    assert height_of(before, 3) == pytest.approx(height_of(after, 3), abs=0.1)


def test_two_fractures_add_up(anatomy: Anatomy) -> None:
    one = Compression(body=anatomy.bodies[2], deformity="crush", loss=0.4, upper_share=1.0)
    two = Compression(body=anatomy.bodies[3], deformity="wedge", loss=0.4, upper_share=1.0)

    found = graded([v.chain_body() for v in chain(compressed(anatomy, one, two), anatomy)])

    assert found[2] is not None
    assert found[3] is not None
    assert found[2].loss.value == pytest.approx(0.4, abs=0.07)
    assert found[3].loss.value == pytest.approx(0.4, abs=0.07)


@pytest.mark.parametrize("deformity", DEFORMITIES)
def test_the_largest_loss_anywhere_is_the_one_that_is_named(anatomy: Anatomy, deformity) -> None:
    grid = np.linspace(-1, 1, 41, dtype=np.float32)
    depth, width = np.meshgrid(grid, grid, indexing="ij")

    lost = loss_at(Compression(body=anatomy.bodies[0], deformity=deformity, loss=0.37), depth, width)

    assert lost.max() == pytest.approx(0.37, abs=1e-6)
    assert lost.min() >= 0


def test_what_lies_below_a_fracture_stays_where_it_was(anatomy: Anatomy) -> None:
    body = anatomy.bodies[2]
    below = (body.frame.centre_zyx - 30 * body.frame.up)[None].astype(np.float32)
    moved = below.copy()

    moved_back(moved, Compression(body=body, deformity="crush", loss=0.5))

    assert moved == pytest.approx(below)
