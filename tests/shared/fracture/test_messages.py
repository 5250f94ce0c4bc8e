"""Every version of every fact that was ever told can be read (docs/decisions/0012-message-versions.md).

`facts_on_the_wire.json`: a line is added with each change of a fact, and none is ever changed or removed.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import pytest

from shared.fracture.messages import FACTS
from shared.pipeline.envelope import Envelope, open_fact

TOLD = [
    Envelope.model_validate(line) for line in json.loads(Path(__file__).with_name("facts_on_the_wire.json").read_text())
]


@pytest.mark.parametrize("envelope", TOLD, ids=lambda one: f"{one.message_type}-{one.fact_version}")
def test_what_was_ever_told_can_be_read(envelope: Envelope) -> None:
    fact = open_fact(envelope, FACTS)

    read = fact.model_dump(mode="json", exclude_unset=True)
    assert read == envelope.body


def test_the_newest_version_of_every_fact_stands_among_them_with_all_its_fields() -> None:
    fields: dict[tuple[str, int], set[str]] = defaultdict(set)
    for envelope in TOLD:
        fields[(envelope.message_type, envelope.fact_version)] |= set(envelope.body)

    today = {(name, fact.VERSION): set(fact.model_fields) for name, fact in FACTS.items()}
    newest = {name: max(version for other, version in fields if other == name) for name in FACTS}

    assert {key: fields[key] for key in newest.items()} == today
