"""Words added to a bundle that is there: what a site found with it, what its makers have to say of it later, or that it
may score the masks of another maker too.

No model, number or threshold changes; the model card, the version and therefore the id do.
"""

from __future__ import annotations

from typing import Final

from shared.fracture.bundle import MANIFEST, Bundle, FileEntry, manifest_bytes

MODEL_CARD: Final = "MODEL_CARD.md"
NOTES_HEADING: Final = "## Notes of its makers"
BRIDGE_HEADING: Final = "### Masks of the segmenter"


def with_notes(card: str, notes: str) -> str:
    """A model card with these notes at its end, in the place of others."""
    before = card.partition(f"\n{NOTES_HEADING}\n")[0]
    return before + (f"\n{NOTES_HEADING}\n{notes.strip()}\n" if notes.strip() else "")


def annotated(bundle: Bundle, notes: str, *, version: str) -> dict[str, bytes]:
    """The bundle's files under another version, with these notes in its model card. ValueError: the same version."""
    return _renewed(bundle, with_notes(bundle.model_card, notes), version=version)


def admitted(bundle: Bundle, source: str, words: str, *, version: str) -> dict[str, bytes]:
    """The files of a bundle that knows one more source of masks, with what the bridge study found in its model card.

    ValueError: the same version, or a source that it knows already.
    """
    if source in bundle.manifest.mask_sources:
        raise ValueError(f"the bundle knows masks of {source} already")
    _, _, notes = bundle.model_card.partition(f"\n{NOTES_HEADING}\n")
    card = with_notes(bundle.model_card, f"{notes.strip()}\n\n{BRIDGE_HEADING}\n{words}")
    return _renewed(bundle, card, version=version, mask_sources=(*bundle.manifest.mask_sources, source))


def _renewed(bundle: Bundle, text: str, *, version: str, **changed: object) -> dict[str, bytes]:
    manifest = bundle.manifest
    if version == manifest.version:
        raise ValueError(f"version {version} is that of the bundle as it is: two bundles would go by one name")
    card = text.encode()
    entries = {**manifest.files, MODEL_CARD: FileEntry.of(card)}
    sealed = manifest.model_copy(update={"version": version, "files": entries, **changed}).sealed()
    return {**bundle.files(), MODEL_CARD: card, MANIFEST: manifest_bytes(sealed)}
