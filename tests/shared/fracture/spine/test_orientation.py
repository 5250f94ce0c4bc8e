from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from shared.fracture.spine.chain import BodyMap, Vertebra, measured_chain
from shared.fracture.spine.orientation import upside_down
from tests.fixtures.spines import DrawnBody, draw_spine


@pytest.fixture(scope="module")
def chain() -> list[Vertebra]:
    drawn = draw_spine([DrawnBody()] * 9, spacing_zyx=(1.5, 1.5, 1.5))
    bodies = BodyMap(labels=drawn.bodies, spacing_zyx=drawn.spacing_zyx, behind=drawn.arches > 0)
    return measured_chain(bodies)


def sized(chain: Sequence[Vertebra], volumes: Sequence[float]) -> list[Vertebra]:
    return [replace(one, volume_ml=volume) for one, volume in zip(chain, volumes, strict=False)]


def test_a_spine_that_stands_as_it_should_has_no_fault(chain: list[Vertebra]) -> None:
    assert upside_down(chain, sacrum_above=False) == ""


def test_a_sacrum_above_the_bodies_means_upside_down(chain: list[Vertebra]) -> None:
    assert "the sacrum is seen above" in upside_down(chain, sacrum_above=True)


@pytest.mark.parametrize(
    ("volumes", "faulty"),
    [
        ((40, 38, 35, 30, 26, 22, 18), True),
        ((11, 13, 57, 48, 34, 43, 26, 18, 17), True),  # with pieces of the sacrum at its upper end
        ((18, 22, 26, 30, 35, 38, 40), False),
        ((30, 30, 30, 14, 30, 30, 27), False),  # a crushed body is no orientation
        ((35, 36, 34, 33, 34, 32, 30), False),  # L5 is often smaller than L3
        ((40, 38, 35, 22, 18), False),  # too few to tell
    ],
)
def test_bodies_that_shrink_towards_the_feet_mean_upside_down(
    chain: list[Vertebra], volumes: tuple[float, ...], faulty: bool
) -> None:
    cut = sized(chain, volumes)[: len(volumes)]

    found = upside_down([replace(one, cut_off=False) for one in cut], sacrum_above=False)

    assert ("grow smaller towards the feet" in found) == faulty
