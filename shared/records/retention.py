"""What may be deleted from the store, and why: data in, one decision a key out. Pure; `garbage.py` reads and deletes.

What depends on what decides here, before any age does. A ledger is computed from plans, outcomes and the mark that a
report exists, so these go as one unit: a sweep as a whole, then the studies that no sweep holds any more, and a unit
only when both of its ages (results and ledger) have passed. What can be made again (volumes, label maps, crops,
features) and what names a patient has an age of its own. Nothing of a study that is under way is ever touched, and
neither is a key that this version does not know.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final, Literal

from shared.pipeline.store import Entry

RetentionClass = Literal["derived", "features", "results", "ledger", "identities", "inbox", "fixed"]
CLASSES: Final[tuple[RetentionClass, ...]] = (
    "derived",
    "features",
    "results",
    "ledger",
    "identities",
    "inbox",
    "fixed",
)
"""`fixed`: the site's own keys, and whatever this version does not know."""

QUIET: Final = timedelta(days=1)
"""A study that anything was written of within this time is left alone: somebody may be at work on it."""

Unit = tuple[Literal["sweep", "study", "letter", "submission", "none"], str]
"""What is deleted together, after one look whether it is still not in use."""

NO_UNIT: Final[Unit] = ("none", "")


@dataclass(frozen=True, kw_only=True)
class Ages:
    """How old the objects of each class become; None keeps them for ever."""

    derived: timedelta | None = None
    features: timedelta | None = None
    results: timedelta | None = None
    ledger: timedelta | None = None
    identities: timedelta | None = None
    inbox: timedelta | None = None

    def of(self, name: RetentionClass) -> timedelta | None:
        """The age of one class."""
        return {
            "derived": self.derived,
            "features": self.features,
            "results": self.results,
            "ledger": self.ledger,
            "identities": self.identities,
            "inbox": self.inbox,
            "fixed": None,
        }[name]

    @property
    def unit(self) -> timedelta | None:
        """The age of a ledger with the results that it is computed from: both ages have passed."""
        return None if self.results is None or self.ledger is None else max(self.results, self.ledger)


@dataclass(frozen=True, kw_only=True)
class Place:
    """What a key holds: its class, how it goes, and of what it is (`of` by field of keys.py)."""

    name: RetentionClass
    rank: int
    with_unit: bool = False
    """Whether it goes with the ledger alone, and never before."""
    of: Mapping[str, str] = field(default_factory=dict)


_Rule = tuple[re.Pattern[str], RetentionClass, bool]


def _rule(pattern: str, name: RetentionClass, *, with_unit: bool = False) -> _Rule:
    return re.compile(re.sub(r"(?<!\?P)<(\w+)>", r"(?P<\1>[^/]+)", pattern) + r"\Z"), name, with_unit


_RULES: Final = (
    # of a sweep: first the marks, so that what a crash leaves is a sweep that still counts its studies by its plan
    _rule("sweeps-of-study/<study>/<sweep>", "ledger", with_unit=True),
    _rule("sweeps/<sweep>/plan/.+", "ledger", with_unit=True),
    _rule("sweeps/<sweep>/closed/.+", "ledger", with_unit=True),
    _rule("named/worklists/<sweep>/.+", "identities"),
    _rule(r"worklists/<sweep>/(?P<revision>\d+)\.\w+", "results"),
    # of a study: first what depends on its plans to be found, its own plan last; a crop's mask before its image
    _rule(r"cases/[^/]+/<case>/mask\.nrrd", "derived"),
    _rule(r"cases/[^/]+/<case>/image\.nrrd", "derived"),
    _rule(r"masks/<series>/[^/]+\.(?:nrrd|png)", "derived"),
    _rule(r"volumes/<series>/[^/]+\.nrrd", "derived"),
    _rule(r"features/(?:hcr|dtl)/[^/]+/(?P<case>[^/]+)\.json", "features"),
    _rule(r"named/reports/<study>/[^/]+\.\w+", "identities"),
    _rule("identities/studies/<study>/.+", "identities"),
    _rule("identities/series/<series>/.+", "identities"),
    _rule("identities/sweeps/<sweep>/.+", "identities"),
    _rule(r"reports/<study>/(?P<report>[^/.]+)\.\w+", "results"),
    _rule(r"outcomes/series-rejected/<series>/[^/]+\.json", "ledger", with_unit=True),
    _rule(r"outcomes/series-dead-lettered/[^/]+/<series>/[^/]+\.json", "ledger", with_unit=True),
    _rule(r"outcomes/report-dead-lettered/[^/]+/<study>\.json", "ledger", with_unit=True),
    _rule(
        r"outcomes/(?:classified|not-evaluated|rejected|dead-lettered)/[^/]+/(?P<case>[^/]+)\.json",
        "results",
        with_unit=True,
    ),
    _rule(r"cases/[^/]+/<case>/case\.json", "results", with_unit=True),
    _rule(r"manifests/<series>/[^/]+\.json", "ledger", with_unit=True),
    _rule(r"masks/<series>/[^/]+\.json", "ledger", with_unit=True),
    _rule(r"volumes/<series>/[^/]+\.json", "ledger", with_unit=True),
    _rule("plans/series/<series>/.+", "ledger", with_unit=True),
    _rule("plans/studies/<study>/.+", "ledger", with_unit=True),
    _rule(r"dead-letters/<letter>/replay-.+", "ledger"),
    _rule(r"dead-letters/<letter>/letter\.json", "ledger"),
    _rule("inbox/<submission>/.+", "inbox"),
)
"""Every kind of key of keys.py, in the order in which a unit's keys are deleted."""


def place_of(key: str) -> Place:
    """What a key holds; class `fixed` where it is the site's own or not known to this version."""
    for rank, (pattern, name, with_unit) in enumerate(_RULES):
        found = pattern.match(key)
        if found is not None:
            return Place(name=name, rank=rank, with_unit=with_unit, of=found.groupdict())
    return Place(name="fixed", rank=len(_RULES))


# what is known -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class Letter:
    """A dead letter: the study that it is about, and whether its work was done since."""

    study_id: str | None
    done: bool


@dataclass(frozen=True, kw_only=True)
class Belongings:
    """Which study a series and a case are of, and which sweeps hold a study (by their plans and by their marks)."""

    study_of_series: Mapping[str, str] = field(default_factory=dict)
    study_of_case: Mapping[str, str] = field(default_factory=dict)
    sweeps_of_study: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def study_of(self, place: Place) -> str | None:
        """The study that a key is of; None where it is of none, or of none that is known."""
        if "study" in place.of:
            return place.of["study"]
        if "series" in place.of:
            return self.study_of_series.get(place.of["series"])
        return self.study_of_case.get(place.of["case"]) if "case" in place.of else None


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What a listing tells: when each unit was last written to, the newest worklists, the complete submissions."""

    last_written: Mapping[Unit, datetime]
    """By anything of it."""
    last_recorded: Mapping[Unit, datetime]
    """By what goes with its ledger alone."""
    reports: Mapping[tuple[str, str], datetime]
    """(study, report) → when it was written."""
    newest_worklists: Mapping[str, tuple[str, datetime]]
    """sweep → the revision, and when it was written."""
    submitted: frozenset[str]

    def recorded(self, unit: Unit, *, reports: frozenset[str] = frozenset()) -> datetime:
        """When the ledger of a unit, and the results that it counts, were last written to."""
        kind, name = unit
        times = [self.last_recorded[unit]] if unit in self.last_recorded else []
        if kind == "sweep" and name in self.newest_worklists:
            times.append(self.newest_worklists[name][1])
        times += [self.reports[name, report] for report in reports if (name, report) in self.reports]
        return max(times, default=self.last_written[unit])


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Where the sweeps, studies and letters stand that something old belongs to. Under way: id → why."""

    sweeps_under_way: Mapping[str, str] = field(default_factory=dict)
    studies_under_way: Mapping[str, str] = field(default_factory=dict)
    reports_that_count: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """study → the reports by which a ledger says "reported". A study that is not in it was not looked at."""
    letters: Mapping[str, Letter] = field(default_factory=dict)


def units_of(place: Place, belongings: Belongings) -> Iterator[Unit]:
    """The units that a key belongs to; a mark belongs to its sweep and to its study."""
    if "sweep" in place.of:
        yield "sweep", place.of["sweep"]
    study = belongings.study_of(place)
    if study is not None:
        yield "study", study
    if "letter" in place.of:
        yield "letter", place.of["letter"]
    if "submission" in place.of:
        yield "submission", place.of["submission"]


def survey(entries: Iterable[Entry], belongings: Belongings) -> Survey:
    """What one listing of the whole store tells."""
    last_written: dict[Unit, datetime] = {}
    last_recorded: dict[Unit, datetime] = {}
    reports: dict[tuple[str, str], datetime] = {}
    worklists: dict[str, tuple[str, datetime]] = {}
    submitted: set[str] = set()
    for entry in entries:
        place = place_of(entry.key)
        for unit in units_of(place, belongings):
            last_written[unit] = max(last_written.get(unit, entry.modified_at), entry.modified_at)
            if place.with_unit:
                last_recorded[unit] = max(last_recorded.get(unit, entry.modified_at), entry.modified_at)
        if "report" in place.of:
            report = place.of["study"], place.of["report"]
            reports[report] = max(reports.get(report, entry.modified_at), entry.modified_at)
        if "revision" in place.of:
            sweep, this = place.of["sweep"], (place.of["revision"], entry.modified_at)
            worklists[sweep] = max(worklists.get(sweep, this), this)
        if "submission" in place.of and entry.key.endswith("/submission.json"):
            submitted.add(place.of["submission"])
    return Survey(
        last_written=last_written,
        last_recorded=last_recorded,
        reports=reports,
        newest_worklists=worklists,
        submitted=frozenset(submitted),
    )


def due(
    entries: Iterable[Entry], *, belongings: Belongings, ages: Ages, now: datetime
) -> tuple[frozenset[str], frozenset[str], frozenset[str]]:
    """The sweeps, studies and letters with something that is older than its class: those that have to be looked at."""
    found: dict[str, set[str]] = {"sweep": set(), "study": set(), "letter": set()}
    for entry in entries:
        place = place_of(entry.key)
        age = ages.unit if place.with_unit else ages.of(place.name)
        if age is not None and now - entry.modified_at >= age:
            for kind, name in units_of(place, belongings):
                found.setdefault(kind, set()).add(name)
    return frozenset(found["sweep"]), frozenset(found["study"]), frozenset(found["letter"])


# decisions -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class Decision:
    """Whether one object goes, and why."""

    key: str
    name: RetentionClass
    bytes: int
    age: timedelta
    delete: bool
    reason: str
    """One of a few sentences, so that they can be counted."""
    detail: str = ""
    """What the reason means here: the ids of sweeps."""
    unit: Unit = NO_UNIT
    rank: int = 0


@dataclass(frozen=True, kw_only=True)
class Doomed:
    """The sweeps and the studies whose ledgers go, as units."""

    sweeps: frozenset[str]
    studies: frozenset[str]


def doomed(*, belongings: Belongings, surveyed: Survey, standing: Standing, ages: Ages, now: datetime) -> Doomed:
    """Which sweeps go as a whole, and which studies no sweep that stays holds."""
    age = ages.unit
    if age is None:
        return Doomed(sweeps=frozenset(), studies=frozenset())

    def is_old(unit: Unit, written: datetime) -> bool:
        counting = standing.reports_that_count.get(unit[1], frozenset()) if unit[0] == "study" else frozenset()
        return now - surveyed.recorded(unit, reports=counting) >= age and now - written >= QUIET

    old = {unit for unit, written in surveyed.last_written.items() if is_old(unit, written)}
    sweeps = frozenset(name for kind, name in old if kind == "sweep" and name not in standing.sweeps_under_way)
    studies = frozenset(
        name
        for kind, name in old
        if kind == "study"
        and name not in standing.studies_under_way
        and belongings.sweeps_of_study.get(name, frozenset()) <= sweeps
    )
    return Doomed(sweeps=sweeps, studies=studies)


def plan(
    entries: Callable[[], Iterable[Entry]],
    *,
    belongings: Belongings,
    surveyed: Survey,
    standing: Standing,
    ages: Ages,
    now: datetime,
) -> Iterator[Decision]:
    """One decision for each object of a listing of the whole store."""
    going = doomed(belongings=belongings, surveyed=surveyed, standing=standing, ages=ages, now=now)
    judge = _Judge(belongings=belongings, surveyed=surveyed, standing=standing, ages=ages, now=now, doomed=going)
    return map(judge.decision, entries())


def in_order(decisions: Iterable[Decision]) -> list[Decision]:
    """Those that delete, in the order in which it is safe: whole sweeps, then study by study, then the rest."""
    kinds = ("sweep", "study", "letter", "submission", "none")
    return sorted(
        (decision for decision in decisions if decision.delete),
        key=lambda decision: (kinds.index(decision.unit[0]), decision.unit[1], decision.rank, decision.key),
    )


def setting_of(name: str) -> str:
    """The setting that holds the age of a class."""
    return f"retention.{name}_days"


@dataclass(frozen=True, kw_only=True)
class _Judge:
    belongings: Belongings
    surveyed: Survey
    standing: Standing
    ages: Ages
    now: datetime
    doomed: Doomed

    def decision(self, entry: Entry) -> Decision:
        place = place_of(entry.key)
        unit = self._unit(place)
        delete, reason, detail = self._verdict(entry, place)
        return Decision(
            key=entry.key,
            name=place.name,
            bytes=entry.bytes,
            age=self.now - entry.modified_at,
            delete=delete,
            reason=reason,
            detail=detail,
            unit=unit,
            rank=place.rank,
        )

    def _unit(self, place: Place) -> Unit:
        return next(units_of(place, self.belongings), NO_UNIT)

    def _verdict(self, entry: Entry, place: Place) -> tuple[bool, str, str]:
        if place.name == "fixed":
            if entry.key.startswith("site/"):
                return False, "the site's own keys are never deleted", ""
            return False, "this version does not know such a key and leaves it alone", ""
        if "submission" in place.of:
            return self._of_submission(place)
        if "letter" in place.of:
            return self._of_letter(place)
        kind, name = self._unit(place)
        if kind == "sweep":
            return self._of_sweep(entry, place, name)
        if kind == "study":
            return self._of_study(entry, place, name)
        return self._by_age(self.now - entry.modified_at, place.name, then="of no study that is known any more")

    def _of_submission(self, place: Place) -> tuple[bool, str, str]:
        if place.of["submission"] in self.surveyed.submitted:
            return False, "a complete submission waits for dicom-ingest or is being read", ""
        written = self.surveyed.last_written["submission", place.of["submission"]]
        return self._by_age(self.now - written, "inbox", then="a half upload (submit it again to go on)")

    def _of_letter(self, place: Place) -> tuple[bool, str, str]:
        letter = self.standing.letters.get(place.of["letter"], Letter(study_id=None, done=True))
        why = self.standing.studies_under_way.get(letter.study_id or "")
        if why is not None:
            return False, "its study is under way", why
        age = self.now - self.surveyed.last_written["letter", place.of["letter"]]
        delete, reason, detail = self._by_age(age, "ledger", then="nothing that is kept speaks of it")
        known = letter.study_id is not None and ("study", letter.study_id) in self.surveyed.last_written
        if delete and known and not letter.done and letter.study_id not in self.doomed.studies:
            return False, "its study is kept, and this letter can still be replayed", ""
        return delete, reason, detail

    def _of_sweep(self, entry: Entry, place: Place, sweep: str) -> tuple[bool, str, str]:
        if sweep in self.standing.sweeps_under_way:
            return False, "its sweep is under way", self.standing.sweeps_under_way[sweep]
        with_the_sweep = place.name != "identities" or entry.key.startswith("named/")
        if with_the_sweep and sweep in self.doomed.sweeps:
            return True, f"older than {self._unit_settings()}: the sweep goes as a whole", ""
        if place.name == "identities":
            return self._by_age(self.now - entry.modified_at, "identities", then="names somebody")
        if "revision" in place.of and place.of["revision"] != self.surveyed.newest_worklists[sweep][0]:
            return self._by_age(self.now - entry.modified_at, "results", then="a newer worklist is there")
        return self._kept_with_its_ledger()

    def _of_study(self, entry: Entry, place: Place, study: str) -> tuple[bool, str, str]:
        if study in self.standing.studies_under_way:
            return False, "its study is under way", self.standing.studies_under_way[study]
        age = self.now - entry.modified_at
        if self.now - self.surveyed.last_written["study", study] < QUIET:
            return False, "something of its study was written within a day", ""
        if study in self.doomed.studies and (place.name in ("results", "ledger") or entry.key.startswith("named/")):
            return True, f"older than {self._unit_settings()}, and no sweep holds its study: it goes as a whole", ""
        if place.name == "derived":
            return self._by_age(age, "derived", then="it is made again when its study is swept again")
        if place.name == "features":
            return self._by_age(age, "features", then="they are computed again where they are needed")
        if place.name == "identities":
            return self._by_age(age, "identities", then="names somebody")
        counting = self.standing.reports_that_count.get(study)
        if "report" in place.of and counting is not None and place.of["report"] not in counting:
            return self._by_age(age, "results", then="no ledger counts it: another report stands in its place")
        staying = self.belongings.sweeps_of_study.get(study, frozenset()) - self.doomed.sweeps
        return self._kept_with_its_ledger(held_by=staying)

    def _kept_with_its_ledger(self, *, held_by: frozenset[str] = frozenset()) -> tuple[bool, str, str]:
        if self.ages.unit is None:
            both = f"{setting_of('results')} and {setting_of('ledger')}"
            return False, f"a ledger is computed from it, and {both} are not both set: kept for ever", ""
        if held_by:
            sweeps = ", ".join(sorted(name[:12] for name in held_by))
            return False, "a sweep that is kept holds it: its ledger is computed from it", f"sweeps {sweeps}"
        return False, f"younger than {self._unit_settings()}", ""

    def _unit_settings(self) -> str:
        parts = [
            f"{setting_of(name)} = {age.days}"
            for name, age in (("results", self.ages.results), ("ledger", self.ages.ledger))
            if age is not None
        ]
        return " and ".join(parts)

    def _by_age(self, age: timedelta, name: RetentionClass, *, then: str) -> tuple[bool, str, str]:
        limit = self.ages.of(name)
        if limit is None:
            return False, f"{setting_of(name)} is not set: kept for ever", ""
        setting = f"{setting_of(name)} = {limit.days}"
        if age < limit:
            return False, f"younger than {setting}", ""
        return True, f"older than {setting}; {then}", ""
