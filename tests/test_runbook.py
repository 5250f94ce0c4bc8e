"""The runbook knows everything that a dead letter can say: kinds, reasons, guards; it cannot drift from the code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.fusion_classifier.service import OUTSIDE_CODE
from services.segmenter.service import NO_MASK
from shared.fracture.guards import ORDER
from shared.pipeline.failures import KINDS, reason_of_death
from shared.records.dead_letters import STATES

ROOT = Path(__file__).resolve().parents[1]
RUNBOOK = " ".join((ROOT / "docs" / "runbook.md").read_text(encoding="utf-8").split())
HEADINGS = [line for line in (ROOT / "docs" / "runbook.md").read_text(encoding="utf-8").splitlines() if line[:1] == "#"]

GIVES_UP = ("Retry", "StoreFull", "OverBudget", "NewerSchema", "_newer", "_Unreadable", "Reject")
"""What is called with the reason for which a message or its input is given up."""
LEFT_OUT = ("services/trainer/", "services/dicom_ingest/")
"""The trainer handles no message; ingest's refusals stand in docs/services/dicom-ingest.md."""


def leading_text(node: ast.expr) -> str:
    """The first constant part of a text that says something, up to its first stop; '' where it has none."""
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    texts = [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]
    clauses = [re.split(r"[;:]", text.strip(" ;:,()"))[0] for text in texts]
    return next((clause for clause in clauses if len(clause) >= 12), "")


def reasons() -> Iterator[tuple[str, str]]:
    """Every reason that is written in the code, with its place."""
    for path in sorted([*ROOT.glob("services/**/*.py"), *ROOT.glob("shared/**/*.py")]):
        place = path.relative_to(ROOT).as_posix()
        if place.startswith(LEFT_OUT):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in GIVES_UP:
                for argument in node.args[:1]:
                    if text := leading_text(argument):
                        yield f"{place}:{node.lineno}", text


REASONS = list(reasons())


def test_the_reasons_are_found_in_the_code() -> None:
    found = {text for _, text in REASONS}

    assert "the crop of the case is not in the store" in found
    assert "the volume or a mask of the series is not in the store" in found
    assert len(found) > 20


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_its_place(kind: str) -> None:
    assert any(re.search(rf"`{kind}`", heading) for heading in HEADINGS)


@pytest.mark.parametrize(("place", "reason"), REASONS, ids=[place for place, _ in REASONS])
def test_every_reason_is_explained(place: str, reason: str) -> None:
    assert reason in RUNBOOK, place


def test_what_the_broker_gives_up_is_explained() -> None:
    begins = reason_of_death("delivery-limit", queue="resampler").partition(" each time")[0]

    assert begins in RUNBOOK
    assert reason_of_death("unreadable", queue="resampler") in RUNBOOK


@pytest.mark.parametrize("code", [*ORDER, OUTSIDE_CODE])
def test_every_guard_is_named(code: str) -> None:
    assert f"`{code}`" in RUNBOOK


@pytest.mark.parametrize("state", STATES)
def test_every_state_of_a_letter_is_explained(state: str) -> None:
    assert f"| `{state}` |" in RUNBOOK


def test_the_commonest_refusal_is_explained() -> None:
    assert NO_MASK in RUNBOOK
