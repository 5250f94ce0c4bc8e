"""Words added to a bundle that is there: what a site found with it, or what its makers have to say of it later.

No model, number or threshold changes; the model card, the version and therefore the id do.
"""

from __future__ import annotations

from typing import Final

from shared.fracture.bundle import MANIFEST, Bundle, FileEntry, manifest_bytes

MODEL_CARD: Final = "MODEL_CARD.md"
NOTES_HEADING: Final = "## Notes of its makers"


def with_notes(card: str, notes: str) -> str:
    """A model card with these notes at its end, in the place of others."""
    before = card.partition(f"\n{NOTES_HEADING}\n")[0]
    return before + (f"\n{NOTES_HEADING}\n{notes.strip()}\n" if notes.strip() else "")


def annotated(bundle: Bundle, notes: str, *, version: str) -> dict[str, bytes]:
    """The bundle's files under another version, with these notes in its model card. ValueError: the same version."""
    manifest = bundle.manifest
    if version == manifest.version:
        raise ValueError(f"version {version} is that of the bundle as it is: two bundles would go by one name")
    card = with_notes(bundle.model_card, notes).encode()
    entries = {**manifest.files, MODEL_CARD: FileEntry.of(card)}
    sealed = manifest.model_copy(update={"version": version, "files": entries}).sealed()
    return {**bundle.files(), MODEL_CARD: card, MANIFEST: manifest_bytes(sealed)}
