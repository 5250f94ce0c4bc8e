from __future__ import annotations

from shared.fracture.messages import FACTS
from shared.fracture.topology import QUEUES, SERVICES, TELLS


def test_every_fact_has_a_queue_that_hears_it() -> None:
    heard = {fact for facts in QUEUES.values() for fact in facts}

    assert heard == set(FACTS)


def test_every_fact_is_told_by_somebody() -> None:
    told = {fact for facts in TELLS.values() for fact in facts}

    assert told == set(FACTS)


def test_every_queue_and_every_dead_letter_queue_has_one_service() -> None:
    consumed = [queue for queues in SERVICES.values() for queue in queues]

    assert sorted(consumed) == sorted([*QUEUES, *(f"{queue}.dead" for queue in QUEUES)])
