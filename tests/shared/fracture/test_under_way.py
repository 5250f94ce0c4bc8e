from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.fracture.topology import QUEUES, WORKLIST
from shared.fracture.under_way import COUNTED, cases_under_way


@pytest.mark.parametrize(
    ("messages", "cases"),
    [
        ({}, 0),
        ({"segmenter": 3, "resampler": 2}, 5),
        ({"radiomics-extractor": 7, "deep-extractor": 7}, 7),
        ({"radiomics-extractor": 7, "deep-extractor": 1}, 7),
        ({"deep-extractor.retry": 4, "deep-extractor": 1, "radiomics-extractor": 2}, 5),
        ({"fusion-classifier": 6}, 3),
        ({"fusion-classifier": 1}, 1),
        ({"report-generator": 2, "report-generator.retry": 1}, 3),
        ({"worklist": 9, "radiomics-extractor.dead": 9}, 0),
    ],
)
def test_each_case_counts_once_wherever_it_waits(messages: dict[str, int], cases: int) -> None:
    assert cases_under_way(messages) == cases


def test_every_queue_of_the_topology_that_holds_cases_is_looked_at_with_its_retries() -> None:
    holding = set(QUEUES) - {WORKLIST}

    assert set(COUNTED) == holding | {f"{queue}.retry" for queue in holding}


@given(st.dictionaries(st.sampled_from(COUNTED), st.integers(0, 1000)))
def test_no_case_is_under_way_only_when_no_queue_holds_a_message(messages: dict[str, int]) -> None:
    assert (cases_under_way(messages) == 0) == (sum(messages.values()) == 0)
