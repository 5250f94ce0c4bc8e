from __future__ import annotations

import ast
from pathlib import Path

import pytest

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


ROOT = Path(__file__).resolve().parents[3]
WITH_FOLDERS = [service for service in SERVICES if (ROOT / "services" / service.replace("-", "_")).is_dir()]


@pytest.mark.parametrize("service", WITH_FOLDERS)
def test_a_service_names_no_fact_that_it_neither_hears_nor_tells(service: str) -> None:
    allowed = {fact for queue in SERVICES[service] for fact in QUEUES.get(queue, ())} | set(TELLS[service])

    named = {
        alias.name
        for path in (ROOT / "services" / service.replace("-", "_")).glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module == "shared.fracture.messages"
        for alias in node.names
    }

    assert named & set(FACTS) <= allowed
