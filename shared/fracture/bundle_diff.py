"""What a bundle is, and what changed between two, in lines that a person reads.

Both bundles were verified by `load_bundle`; here nothing is computed but differences.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from pydantic import BaseModel, JsonValue

from shared.fracture.bundle import BRANCHES, Branch, Bundle, LinearModel, OnnxClassifier, Pca
from shared.fracture.ids import short

NAMES: Final[dict[Branch, str]] = {"hcr": "HCR model", "dtl": "DTL model", "fusion": "fusion model"}
SHOWN: Final = 10
"""How many names or numbers of one kind are listed; the rest is counted."""
SHOWN_METRICS: Final = 40


def summary(bundle: Bundle) -> str:
    """What a bundle is, in one line."""
    manifest = bundle.manifest
    kinds = [f"{branch} {classifier.kind}" for branch, classifier in bundle.models.classifiers.items()]
    return (
        f"{manifest.kind} {manifest.name} {manifest.version}, preset {manifest.preset}, schema "
        f"{manifest.schema_version}, id {short(bundle.bundle_id)}; classifiers: {', '.join(kinds) or 'linear'}"
    )


def description(bundle: Bundle) -> tuple[str, ...]:
    """What a bundle holds: protocols, models, thresholds, training, metrics and files."""
    manifest, models = bundle.manifest, bundle.models
    lines = [
        summary(bundle),
        f"bundle_id: {bundle.bundle_id}",
        f"crop: {_fields(manifest.crop)} ({short(manifest.crop.crop_hash)})",
        f"HCR: {len(bundle.hcr_features)} features, pyradiomics {manifest.hcr.pyradiomics_version} "
        f"({short(manifest.hcr.hcr_hash)})",
        f"DTL: {manifest.dtl.box} box, margin {number(manifest.dtl.box_margin_mm)} mm, {manifest.dtl.size} x "
        f"{manifest.dtl.size}, {len(models.pca.inputs)} features of network {short(manifest.dtl.network_sha256)}, "
        f"mode {manifest.training.dtl_mode} ({short(manifest.dtl.dtl_hash)})",
    ]
    for branch in BRANCHES:
        lines.append(f"{NAMES[branch]}: {_model(models.branch(branch))}")
    lines.append(f"threshold of the fusion model: {number(manifest.threshold)}")
    if models.thresholds is not None:
        lines.append(f"thresholds: {_fields(models.thresholds)}")
    lines.append("conformal limits: " + ("none" if models.conformal is None else _fields(models.conformal)))
    lines.append(f"nomogram: {_fields(bundle.nomogram)}")
    lines.append(f"training: {_mapping(manifest.training.counts)}; seeds {_mapping(manifest.training.seeds)}")
    lines.append(f"kernels: {_listed(manifest.training.kernels)}; kVp: {_listed(map(number, manifest.training.kvp))}")
    lines.append(f"mask sources: {_listed(manifest.mask_sources)}")
    lines += [f"metric {name}: {_text(value)}" for name, value in _leaves(bundle.metrics)]
    for name, entry in sorted(manifest.files.items()):
        lines.append(f"file {name}: {entry.size} bytes, {short(entry.sha256)}")
    return tuple(lines)


def differences(old: Bundle, new: Bundle) -> tuple[str, ...]:
    """What changed from one bundle to another, a line each; empty where nothing did."""
    if old.bundle_id == new.bundle_id:
        return ()
    return tuple(line for part in _PARTS for line in part(old, new))


def number(value: float) -> str:
    """A number with six digits."""
    return f"{value:.6g}"


def _change(what: str, old: object, new: object) -> Iterator[str]:
    if old == new:
        return
    before, after = _text(old), _text(new)
    if before == after:
        before, after = repr(old), repr(new)
    yield f"{what}: {before} → {after}"


def _text(value: object) -> str:
    if isinstance(value, float):
        return number(value)
    if value is None:
        return "none"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(_text(one) for one in value)})" if value else "none"
    if isinstance(value, Mapping):
        return _mapping(value)
    return str(value)


def _mapping(values: Mapping[Any, Any]) -> str:
    return ", ".join(f"{name} {_text(value)}" for name, value in values.items()) or "none"


def _fields(model: BaseModel) -> str:
    return _mapping(model.model_dump())


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _some(names: Sequence[str], *, most: int = SHOWN) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _fields_changed(what: str, old: BaseModel, new: BaseModel) -> Iterator[str]:
    before, after = old.model_dump(), new.model_dump()
    for name in before:
        yield from _change(f"{what} {name}", before[name], after[name])


def _members(what: str, old: Sequence[str], new: Sequence[str]) -> Iterator[str]:
    """Names that came and went, or the same in another order."""
    added, removed = sorted(set(new) - set(old)), sorted(set(old) - set(new))
    if added:
        yield f"{what}: {len(added)} added: {_some(added)}"
    if removed:
        yield f"{what}: {len(removed)} removed: {_some(removed)}"
    if not added and not removed and tuple(old) != tuple(new):
        yield f"{what}: the same in another order"


def _numbers_changed(what: str, old: Mapping[str, float], new: Mapping[str, float]) -> Iterator[str]:
    """Numbers of names that both have, the largest changes first."""
    changed = sorted(
        (name for name in old if name in new and old[name] != new[name]),
        key=lambda name: (-abs(new[name] - old[name]), name),
    )
    if changed:
        shown = [next(_change(name, old[name], new[name])) for name in changed]
        yield f"{what} of {_count(len(changed), 'feature')} changed: {_some(shown)}"


def _manifest(old: Bundle, new: Bundle) -> Iterator[str]:
    for name in ("kind", "name", "version", "preset", "schema_version", "mask_sources"):
        yield from _change(name.replace("_", " "), getattr(old.manifest, name), getattr(new.manifest, name))


def _protocols(old: Bundle, new: Bundle) -> Iterator[str]:
    before, after = old.manifest, new.manifest
    if before.crop.crop_hash != after.crop.crop_hash:
        yield "another crop protocol: no feature of the old bundle is one of the new"
    yield from _fields_changed("crop", before.crop, after.crop)
    if before.hcr.hcr_hash != after.hcr.hcr_hash:
        yield "another HCR protocol: hand-crafted features are extracted again"
    yield from _change("pyradiomics version", before.hcr.pyradiomics_version, after.hcr.pyradiomics_version)
    if before.hcr.parameters_sha256 != after.hcr.parameters_sha256:
        yield "pyradiomics.yaml: another parameter file"
    if before.dtl.dtl_hash != after.dtl.dtl_hash:
        yield "another DTL protocol: deep features are computed again"
    for name in ("box", "box_margin_mm", "size"):
        yield from _change(f"picture {name.replace('_', ' ')}", getattr(before.dtl, name), getattr(after.dtl, name))
    yield from _change("network", short(before.dtl.network_sha256), short(after.dtl.network_sha256))


def _hcr_list(old: Bundle, new: Bundle) -> Iterator[str]:
    yield from _members("list of HCR features", old.hcr_features, new.hcr_features)


def _pca(old: Bundle, new: Bundle) -> Iterator[str]:
    before, after = old.models.pca, new.models.pca
    yield from _members("deep features", before.inputs, after.inputs)
    yield from _members("components", before.names, after.names)
    if before.inputs == after.inputs and (before.mean, before.sd) != (after.mean, after.sd):
        yield "mean or SD of the deep features changed"
    changed = [name for name in before.names if name in after.names and _row(before, name) != _row(after, name)]
    if changed:
        yield f"weights of {_count(len(changed), 'component')} changed: {_some(changed)}"


def _row(pca: Pca, name: str) -> tuple[tuple[float, ...], float]:
    place = pca.names.index(name)
    return pca.components[place], pca.offset[place] if pca.offset else 0.0


def _models(old: Bundle, new: Bundle) -> Iterator[str]:
    for branch in BRANCHES:
        what, before, after = NAMES[branch], old.models.branch(branch), new.models.branch(branch)
        yield from _members(f"{what}, selected features", before.inputs, after.inputs)
        for field in ("coef", "mean", "sd"):
            noun = {"coef": "coefficients", "mean": "training means", "sd": "training SDs"}[field]
            yield from _numbers_changed(f"{what}, {noun}", _by_name(before, field), _by_name(after, field))
        yield from _change(f"{what}, intercept", before.intercept, after.intercept)
        yield from _change(f"{what}, linear score", before.score_kind, after.score_kind)
        yield from _change(f"{what}, calibration of the linear score", _platt(before), _platt(after))
        yield from _classifier(what, before.classifier, after.classifier, old, new)


def _by_name(model: LinearModel, field: str) -> dict[str, float]:
    return dict(zip(model.inputs, getattr(model, field), strict=True))


def _platt(model: LinearModel) -> dict[str, float] | None:
    return None if model.platt is None else model.platt.model_dump()


def _classifier(
    what: str, before: OnnxClassifier | None, after: OnnxClassifier | None, old: Bundle, new: Bundle
) -> Iterator[str]:
    kinds = [None if one is None else one.kind for one in (before, after)]
    if kinds[0] != kinds[1]:
        yield f"{what}, classifier: {kinds[0] or 'the linear score'} → {kinds[1] or 'the linear score'}"
    if before is None or after is None:
        return
    hashes = [bundle.manifest.files[one.file].sha256 for bundle, one in ((old, before), (new, after))]
    if kinds[0] == kinds[1] and hashes[0] != hashes[1]:
        yield f"{what}, classifier: {kinds[0]}, fitted anew ({short(hashes[0])} → {short(hashes[1])})"
    yield from _change(f"{what}, calibration of the classifier", before.platt.model_dump(), after.platt.model_dump())


def _decisions(old: Bundle, new: Bundle) -> Iterator[str]:
    yield from _change("threshold of the fusion model", old.manifest.threshold, new.manifest.threshold)
    before, after = old.models.thresholds, new.models.thresholds
    if before is not None and after is not None:
        for name in ("hcr", "dtl", "nomogram"):
            yield from _change(f"threshold of {name}", getattr(before, name), getattr(after, name))
    elif before is not after:
        yield from _change("thresholds of each model", before and before.model_dump(), after and after.model_dump())
    limits = [None if one.models.conformal is None else one.models.conformal.model_dump() for one in (old, new)]
    yield from _change("conformal limits", limits[0], limits[1])


def _nomogram(old: Bundle, new: Bundle) -> Iterator[str]:
    yield from _fields_changed("nomogram", old.nomogram, new.nomogram)


def _training(old: Bundle, new: Bundle) -> Iterator[str]:
    before, after = old.manifest.training, new.manifest.training
    if before.fingerprint != after.fingerprint:
        yield "fitted on other training cases (their fingerprint differs)"
    for what, first, second in (("count", before.counts, after.counts), ("seed", before.seeds, after.seeds)):
        for name in sorted({*first, *second}):
            yield from _change(f"{what} {name}", first.get(name), second.get(name))
    yield from _change("deep features fitted", before.dtl_mode, after.dtl_mode)
    yield from _change("kernels seen in training", before.kernels, after.kernels)
    yield from _change("kVp seen in training", before.kvp, after.kvp)


def _ranges(old: Bundle, new: Bundle) -> Iterator[str]:
    before, after = old.distribution.features, new.distribution.features
    changed = sorted(name for name in before if name in after and before[name] != after[name])
    if changed:
        yield f"training range of {_count(len(changed), 'selected feature')} changed: {_some(changed)}"


def _metrics(old: Bundle, new: Bundle) -> Iterator[str]:
    before, after = dict(_leaves(old.metrics)), dict(_leaves(new.metrics))
    changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    for name in changed[:SHOWN_METRICS]:
        yield from _change(f"metric {name}", before.get(name), after.get(name))
    if len(changed) > SHOWN_METRICS:
        yield f"and {len(changed) - SHOWN_METRICS} more metrics"


def _leaves(value: JsonValue, path: str = "") -> Iterator[tuple[str, JsonValue]]:
    """Every number and text of nested JSON objects, with its path in dots."""
    if isinstance(value, dict):
        for name, below in value.items():
            yield from _leaves(below, f"{path}.{name}" if path else name)
    else:
        yield path, value


def _files(old: Bundle, new: Bundle) -> Iterator[str]:
    yield from _members("files", sorted(old.manifest.files), sorted(new.manifest.files))
    for name, what in (("golden.json", "golden vectors or image"), ("MODEL_CARD.md", "model card")):
        if old.manifest.files[name] != new.manifest.files[name]:
            yield f"{what}: changed ({name})"


_PARTS: Final = (
    _manifest,
    _protocols,
    _hcr_list,
    _pca,
    _models,
    _decisions,
    _nomogram,
    _training,
    _ranges,
    _metrics,
    _files,
)


def _model(model: LinearModel) -> str:
    parts = [f"{_count(len(model.inputs), 'feature')}, {model.score_kind} score, intercept {number(model.intercept)}"]
    if model.platt is not None:
        parts.append(f"calibrated with {_fields(model.platt)}")
    if model.classifier is not None:
        parts.append(
            f"probability by {model.classifier.kind} ({model.classifier.file}), calibrated with "
            f"{_fields(model.classifier.platt)}"
        )
    return "; ".join(parts)
