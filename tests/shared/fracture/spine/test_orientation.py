from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from shared.fracture.spine.chain import BodyMap, Vertebra, measured_chain
from shared.fracture.spine.orientation import behind_mm, orientation_fault
from tests.fixtures.spines import DrawnBody, draw_spine


@pytest.fixture(scope="module")
def chain() -> list[Vertebra]:
    drawn = draw_spine([DrawnBody()] * 7, spacing_zyx=(1.5, 1.5, 1.5))
    bodies = BodyMap(labels=drawn.bodies, spacing_zyx=drawn.spacing_zyx, behind=drawn.arches > 0)
    return measured_chain(bodies)


def sized(chain: Sequence[Vertebra], volumes: Sequence[float]) -> list[Vertebra]:
    return [replace(one, volume_ml=volume) for one, volume in zip(chain, volumes, strict=False)]


def test_a_spine_that_stands_as_it_should_has_no_fault(chain: list[Vertebra]) -> None:
    assert orientation_fault(chain, sacrum_above=False, arches_behind_mm=25.0) == ""


def test_a_sacrum_above_the_bodies_means_upside_down(chain: list[Vertebra]) -> None:
    assert "the sacrum is seen above" in orientation_fault(chain, sacrum_above=True, arches_behind_mm=25.0)


@pytest.mark.parametrize(
    ("volumes", "faulty"),
    [
        ((40, 38, 35, 30, 26, 22, 18), True),
        ((18, 22, 26, 30, 35, 38, 40), False),
        ((30, 30, 30, 14, 30, 30, 27), False),  # a crushed body is no orientation
        ((40, 38, 35, 22, 18), False),  # too few to tell
    ],
)
def test_bodies_that_shrink_towards_the_feet_mean_upside_down(
    chain: list[Vertebra], volumes: tuple[float, ...], faulty: bool
) -> None:
    found = orientation_fault(sized(chain, volumes), sacrum_above=False, arches_behind_mm=25.0)

    assert ("grow smaller towards the feet" in found) == faulty


@pytest.mark.parametrize(("turned", "faulty"), [(False, False), (True, True)])
def test_arches_before_the_bodies_mean_that_front_and_back_are_exchanged(
    chain: list[Vertebra], turned: bool, faulty: bool
) -> None:
    drawn = draw_spine([DrawnBody()] * 4, spacing_zyx=(1.5, 1.5, 1.5))
    bodies, arches = drawn.bodies > 0, drawn.arches > 0
    if turned:
        bodies, arches = bodies[:, ::-1], arches[:, ::-1]

    away = behind_mm(arches, bodies, spacing_mm=1.5)

    assert away is not None
    assert (away < -10) == turned
    found = orientation_fault(chain, sacrum_above=False, arches_behind_mm=away)
    assert ("front and back are exchanged" in found) == faulty


def test_bodies_without_arches_say_nothing_of_their_back(chain: list[Vertebra]) -> None:
    nothing = np.zeros((4, 5, 6), dtype=bool)

    assert behind_mm(nothing, ~nothing, spacing_mm=1.5) is None
    assert orientation_fault(chain, sacrum_above=False, arches_behind_mm=None) == ""
