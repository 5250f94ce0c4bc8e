"""The ages of the settings, and what a garbage collector shows of its decisions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from services.settings import RetentionSettings
from shared.records.garbage import Collected
from shared.records.retention import CLASSES, Ages, Decision, RetentionClass


def ages_of(settings: RetentionSettings) -> Ages:
    """The ages that the settings give in days."""

    def age(days: int | None) -> timedelta | None:
        return None if days is None else timedelta(days=days)

    return Ages(
        derived=age(settings.derived_days),
        features=age(settings.features_days),
        results=age(settings.results_days),
        ledger=age(settings.ledger_days),
        identities=age(settings.identities_days),
        inbox=age(settings.inbox_days),
    )


@dataclass(kw_only=True)
class Heap:
    """Some objects together: how many, their bytes, and the age of the oldest."""

    objects: int = 0
    bytes: int = 0
    oldest: timedelta = timedelta(0)

    @property
    def oldest_days(self) -> int:
        """The age of the oldest in whole days."""
        return self.oldest.days

    def add(self, decision: Decision) -> None:
        """One more."""
        self.objects += 1
        self.bytes += decision.bytes
        self.oldest = max(self.oldest, decision.age)

    def as_json(self) -> dict[str, object]:
        """As JSON values."""
        return {"objects": self.objects, "bytes": self.bytes, "oldest_days": self.oldest_days}


@dataclass(frozen=True, kw_only=True)
class ClassRow:
    """What is kept and what goes of one class."""

    name: RetentionClass
    kept: Heap
    going: Heap


@dataclass(frozen=True, kw_only=True)
class ReasonRow:
    """How much is kept, or goes, for one reason."""

    name: RetentionClass
    delete: bool
    reason: str
    heap: Heap


@dataclass(kw_only=True)
class Summary:
    """All decisions: those that delete one by one, the others counted."""

    going: list[Decision] = field(default_factory=list)
    heaps: dict[tuple[RetentionClass, bool, str], Heap] = field(default_factory=dict)

    def classes(self) -> Iterator[ClassRow]:
        """A row for each class that something is of."""
        for name in CLASSES:
            kept, going = (self._of_class(name, delete) for delete in (False, True))
            if kept.objects or going.objects:
                yield ClassRow(name=name, kept=kept, going=going)

    def _of_class(self, name: RetentionClass, delete: bool) -> Heap:
        heaps = [heap for (of, goes, _), heap in self.heaps.items() if (of, goes) == (name, delete)]
        return Heap(
            objects=sum(heap.objects for heap in heaps),
            bytes=sum(heap.bytes for heap in heaps),
            oldest=max((heap.oldest for heap in heaps), default=timedelta(0)),
        )

    def reasons(self) -> Iterator[ReasonRow]:
        """A row for each reason: class by class, what goes first."""
        for name, delete, reason in sorted(self.heaps, key=lambda key: (CLASSES.index(key[0]), not key[1], key[2])):
            yield ReasonRow(name=name, delete=delete, reason=reason, heap=self.heaps[name, delete, reason])

    def as_json(self, *, at: datetime, done: Collected | None) -> dict[str, object]:
        """As JSON values; `done` is what was really deleted, None after a dry run."""
        return {
            "at": at.isoformat(),
            "dry_run": done is None,
            "classes": {row.name: {"kept": row.kept.as_json(), "going": row.going.as_json()} for row in self.classes()},
            "reasons": [
                {"class": row.name, "delete": row.delete, "reason": row.reason, **row.heap.as_json()}
                for row in self.reasons()
            ],
            "going": [decision_json(decision) for decision in self.going],
            "deleted": None if done is None else [decision.key for decision in done.deleted],
            "left": [] if done is None else [{kind: name, "because": why} for (kind, name), why in done.left],
        }


def summary(decisions: Iterable[Decision]) -> Summary:
    """The decisions counted, and those that delete kept whole."""
    found = Summary()
    for decision in decisions:
        found.heaps.setdefault((decision.name, decision.delete, decision.reason), Heap()).add(decision)
        if decision.delete:
            found.going.append(decision)
    return found


def decision_json(decision: Decision) -> dict[str, object]:
    """One decision as JSON values."""
    return {
        "key": decision.key,
        "class": decision.name,
        "bytes": decision.bytes,
        "age_days": decision.age.days,
        "delete": decision.delete,
        "reason": decision.reason,
        "detail": decision.detail,
    }
