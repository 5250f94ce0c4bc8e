"""SeriesStored in, MasksReady out: masks for series that came without, heights and the gate for all.

Masks that came with a series are kept: they are measured, and their vertebrae gated only where the setting says so.
What an automatic mask will be called is known before it is computed (image, network, rules, demographics), so a run
that stopped goes on where it was and a series told twice is segmented once. With the source `off` a series passes as it
came, and one without masks is refused.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pydantic import BaseModel

from services.segmenter.plugged_in import CommandRefused, PluggedIn, plug_in, read_declaration, read_labels, run_command
from services.segmenter.segmentation import NotSegmentable
from services.segmenter.series_spine import BuiltIn, Given, Plugged, SeriesSpine, UnusableSpine, compute_spine
from services.segmenter.settings import SegmenterSettings
from shared.fracture import ids, keys
from shared.fracture.messages import FACTS, Fact, MasksReady, SeriesStored
from shared.fracture.records import MaskRecord, SeriesManifest, Warned
from shared.fracture.spine.network_card import NetworkCardError, load_network
from shared.fracture.spine.record import SegmenterNote, SpineRecord, rules_of, spine_hash
from shared.fracture.topology import SEGMENTER
from shared.fracture.volume import to_nrrd, volume_from_nrrd_file
from shared.pipeline.errors import FractureSweepError, NotInStore, Reject, Retry
from shared.pipeline.process_pool import ProcessPool
from shared.pipeline.service import Service
from shared.pipeline.spool import PREFIX
from shared.pipeline.store import Store
from shared.records.archive import read_record, write_record
from shared.records.outcomes import rejecting

NO_MASK: Final = "no vertebra mask came with the series"
SERIES_PER_PROCESS: Final = 25
"""After so many series a process is replaced by a new one, since long-lived ones leak."""


def refusals(manifest: SeriesManifest, *, max_slice_spacing_mm: float, tolerance_mm: float) -> tuple[str, ...]:
    """Why a series without masks cannot be scored, the leading reason first."""
    return (
        *(manifest.mask_faults or (NO_MASK,)),
        *too_coarse(manifest, max_slice_spacing_mm=max_slice_spacing_mm, tolerance_mm=tolerance_mm),
    )


def too_coarse(manifest: SeriesManifest, *, max_slice_spacing_mm: float, tolerance_mm: float) -> tuple[str, ...]:
    """That no vertebra of a series could be scored, whatever its mask."""
    coarsest = max(manifest.grid.spacing_zyx)
    if coarsest <= max_slice_spacing_mm + tolerance_mm:
        return ()
    return (f"slice spacing {coarsest:.1f} mm is above {max_slice_spacing_mm:.1f} mm",)


@dataclass(frozen=True, kw_only=True)
class Network:
    """Our own network as a maker of masks."""

    network: BuiltIn
    note: SegmenterNote


Maker = Network | PluggedIn


@dataclass(frozen=True, kw_only=True)
class Segmenter:
    """The handler of SeriesStored over a store. `maker`: our own network or a command, where masks are made."""

    store: Store
    settings: SegmenterSettings
    pool: ProcessPool
    maker: Maker | None
    max_slice_spacing_mm: float
    tolerance_mm: float

    def series_stored(self, fact: SeriesStored) -> Iterator[Fact]:
        """Tells the masks of a series; Reject where it has none and none can be made."""
        manifest = read_record(self.store, keys.manifest(fact.series_id, fact.manifest_id), SeriesManifest)
        if manifest.mask_hash is not None:
            yield self._given(fact, manifest, manifest.mask_hash)
            return
        if self.maker is None:
            raise Reject(
                *refusals(manifest, max_slice_spacing_mm=self.max_slice_spacing_mm, tolerance_mm=self.tolerance_mm)
            )
        coarse = too_coarse(manifest, max_slice_spacing_mm=self.settings.coarsest_mm, tolerance_mm=self.tolerance_mm)
        if coarse:  # before a minute is spent on what no network can see
            raise Reject(*coarse)
        yield self._automatic(fact, manifest, self.maker)

    # given masks ----------------------------------------------------------------------------------------------------
    def _given(self, fact: SeriesStored, manifest: SeriesManifest, mask_hash: str) -> MasksReady:
        if self.settings.source == "off":
            return _ready(fact, mask_hash=mask_hash)
        masks = read_record(self.store, keys.mask_record(fact.series_id, mask_hash), MaskRecord)
        if not masks.levels:
            return _ready(fact, mask_hash=mask_hash)
        gated = self.settings.gate == "all"
        hashed = self._gated_copy(masks) if gated else mask_hash
        spine = spine_hash(mask_hash=hashed, gate=self.settings.gate, limits=self.settings.limits)
        if not self.store.exists(keys.spine(fact.series_id, spine)):
            found = self._computed(manifest, masks)
            self._write_spine(fact, found, spine, mask_hash=hashed, note=SegmenterNote(kind="given"), gated=gated)
        return _ready(fact, mask_hash=hashed, spine_hash=spine)

    def _gated_copy(self, masks: MaskRecord) -> str:
        """The same masks under another name: gated cases are others than those that their author asked to be scored."""
        series_id = masks.series_id
        rules = rules_of(gate=self.settings.gate, limits=self.settings.limits)
        hashed = ids.mask_hash({"given": masks.mask_hash, "gated by": rules})
        copies = [(keys.mask(series_id, masks.mask_hash), keys.mask(series_id, hashed))]
        if masks.has_body_mask:
            copies.append((keys.body_mask(series_id, masks.mask_hash), keys.body_mask(series_id, hashed)))
        for source, target in copies:
            if not self.store.exists(target):
                try:
                    self.store.put(target, self.store.get(source))
                except NotInStore:
                    raise _dropped() from None
        record = masks.model_copy(update={"mask_hash": hashed})
        write_record(self.store, keys.mask_record(series_id, hashed), record)
        return hashed

    # automatic masks ------------------------------------------------------------------------------------------------
    def _automatic(self, fact: SeriesStored, manifest: SeriesManifest, maker: Maker) -> MasksReady:
        limits, gate, note = self.settings.limits, self.settings.gate, maker.note
        hashed = ids.mask_hash(
            {
                "automatic": note.model_dump(mode="json"),
                "image": manifest.image_hash,
                "gated by": rules_of(gate="auto", limits=limits),
                "demographics": manifest.demographics.model_dump(mode="json"),
            }
        )
        spine = spine_hash(mask_hash=hashed, gate=gate, limits=limits)
        there = (
            keys.mask(fact.series_id, hashed),
            keys.mask_record(fact.series_id, hashed),
            keys.spine(fact.series_id, spine),
        )
        if not all(map(self.store.exists, there)):
            found = self._computed(manifest, maker)
            self.store.put(keys.mask(fact.series_id, hashed), found.labels)
            write_record(
                self.store,
                keys.mask_record(fact.series_id, hashed),
                MaskRecord(
                    series_id=fact.series_id,
                    mask_hash=hashed,
                    source="automatic",
                    segmenter=note.source,
                    roi_kind="body",
                    levels=found.levels,
                    warnings=_of_masks(manifest, found),
                ),
            )
            self._write_spine(fact, found, spine, mask_hash=hashed, note=note, gated=True)
        return _ready(fact, mask_hash=hashed, spine_hash=spine)

    # both -----------------------------------------------------------------------------------------------------------
    def _computed(self, manifest: SeriesManifest, masks: Maker | MaskRecord) -> SeriesSpine:
        """The spine of a series, in a process of the pool; a command runs in one of its own before."""
        with tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True) as name:
            folder = Path(name)
            volume = self._fetched(keys.volume(manifest.series_id, manifest.image_hash), folder / "volume.nrrd")
            try:
                source = self._source(folder, masks, volume)
                return self.pool.run(compute_spine, volume, source, limits=self.settings.limits)
            except (NotSegmentable, UnusableSpine, CommandRefused) as error:
                raise Reject(str(error), *manifest.mask_faults) from None

    def _source(self, folder: Path, masks: Maker | MaskRecord, volume: Path) -> BuiltIn | Plugged | Given:
        match masks:
            case MaskRecord():
                return self._given_files(folder, masks)
            case PluggedIn():
                return _by_command(folder, masks, volume)
            case _:
                return masks.network

    def _given_files(self, folder: Path, masks: MaskRecord) -> Given:
        series_id, mask_hash = masks.series_id, masks.mask_hash
        cut = masks.has_body_mask and masks.roi_kind == "vertebra"
        return Given(
            labels=self._fetched(keys.mask(series_id, mask_hash), folder / "labels.nrrd"),
            levels=masks.levels,
            roi_kind=masks.roi_kind,
            bodies=self._fetched(keys.body_mask(series_id, mask_hash), folder / "bodies.nrrd") if cut else None,
        )

    def _fetched(self, key: str, path: Path) -> Path:
        try:
            path.write_bytes(self.store.get(key))
        except NotInStore:
            raise _dropped() from None
        return path

    def _write_spine(
        self,
        fact: SeriesStored,
        found: SeriesSpine,
        hashed: str,
        *,
        mask_hash: str,
        note: SegmenterNote,
        gated: bool,
    ) -> None:
        """The pictures, then the record that tells that all of it is there."""
        for view, png in found.pictures.items():
            self.store.put(keys.spine_picture(fact.series_id, hashed, view), png)
        record = SpineRecord(
            series_id=fact.series_id,
            mask_hash=mask_hash,
            segmenter=note,
            levels_from=found.levels_from,
            doubts=found.doubts,
            gate=self.settings.gate,
            gated=gated,
            limits=self.settings.limits,
            findings=found.findings,
            warnings=tuple(Warned(code="spine", sentence=sentence) for sentence in found.warnings),
        )
        write_record(self.store, keys.spine(fact.series_id, hashed), record)


def _by_command(folder: Path, plugged: PluggedIn, volume: Path) -> Plugged:
    """The label map of a plugged-in command, looked at and brought into a file for the process that measures it."""
    scan = volume_from_nrrd_file(volume)
    work = folder / "work"
    work.mkdir()
    labels, levels = read_labels(plugged, run_command(plugged, scan, work), scan)
    path = folder / "labels.nrrd"
    path.write_bytes(to_nrrd(labels))
    return Plugged(labels=path, levels=levels, roi_kind=plugged.declaration.roi)


def _dropped() -> Retry:
    return Retry(
        "the volume or a mask of the series is not in the store; where retention dropped it: sweep the study with its "
        "masks again"
    )


def _of_masks(manifest: SeriesManifest, found: SeriesSpine) -> tuple[Warned, ...]:
    """What a reader of a case should know of its automatic mask."""
    sentences = [("levels", doubt) for doubt in found.doubts]
    sentences += [("levels", warning) for warning in found.warnings]
    sentences += [("mask-not-used", f"a mask that came along was not used: {fault}") for fault in manifest.mask_faults]
    return tuple(Warned(code=code, sentence=sentence) for code, sentence in sentences)


def _ready(fact: SeriesStored, *, mask_hash: str, spine_hash: str | None = None) -> MasksReady:
    more = {} if spine_hash is None else {"spine_hash": spine_hash}  # a field at its default is not sent
    return MasksReady(
        study_id=fact.study_id,
        series_id=fact.series_id,
        manifest_id=fact.manifest_id,
        protocols=fact.protocols,
        mask_hash=mask_hash,
        **more,
    )


def maker_of(settings: SegmenterSettings) -> Maker | None:
    """Who makes masks under these settings, looked at; FractureSweepError where it cannot be used."""
    match settings.source:
        case "off":
            return None
        case "built-in":
            return built_in_of(settings)
        case "command":
            if settings.command is None:
                raise FractureSweepError("segmenter.source is command, but segmenter.command names no declaration")
            return plug_in(read_declaration(settings.command))


def built_in_of(settings: SegmenterSettings) -> Network:
    """The built-in network of the settings, verified; FractureSweepError where it cannot be used."""
    try:
        card, _ = load_network(settings.network)
    except NetworkCardError as error:
        raise FractureSweepError(f"segmenter.network: {error}") from None
    note = SegmenterNote(kind="built-in", name=card.name, version=card.version, sha256=card.network_sha256)
    return Network(network=BuiltIn(folder=settings.network, threads=settings.threads), note=note)


def build(
    *,
    store: Store,
    settings: SegmenterSettings | None = None,
    max_slice_spacing_mm: float = 3.0,
    tolerance_mm: float = 1e-3,
    pool: ProcessPool | None = None,
) -> Service:
    """The segmenter over a store; the spacing limit is the resampler's own, told where a series is refused anyway."""
    chosen = settings or SegmenterSettings()
    processes = pool or spine_pool(chosen)
    segmenter = Segmenter(
        store=store,
        settings=chosen,
        pool=processes,
        maker=maker_of(chosen),
        max_slice_spacing_mm=max_slice_spacing_mm,
        tolerance_mm=tolerance_mm,
    )

    def series_stored(fact: BaseModel) -> Iterable[BaseModel]:
        if not isinstance(fact, SeriesStored):
            raise TypeError(f"the segmenter handles SeriesStored, not {type(fact).__name__}")
        return segmenter.series_stored(fact)

    return Service(
        name=SEGMENTER,
        queues=(SEGMENTER,),
        messages=FACTS,
        handlers={SeriesStored: series_stored},
        rejected=rejecting(store, SEGMENTER),
        slots=chosen.series_at_once,
        ready=processes.check,
        close=processes.close,
    )


def spine_pool(settings: SegmenterSettings) -> ProcessPool:
    """Processes in which spines are computed, each within the budget of the settings."""
    return ProcessPool(
        what="the segmentation",
        processes=settings.series_at_once,
        seconds=settings.series_seconds,
        memory_gib=settings.memory_gib,
        jobs_per_process=SERIES_PER_PROCESS,
        preload=("services.segmenter.series_spine",) if settings.source != "off" else (),
    )
