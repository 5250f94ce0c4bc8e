"""Reading and writing records under their keys, and revisions that supersede without a pointer being moved."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from shared.fracture import keys
from shared.fracture.records import Record
from shared.pipeline.envelope import only_unknown_fields, schema_version_in
from shared.pipeline.errors import FractureSweepError, NewerSchema, NotInStore, Retry
from shared.pipeline.store import Store

M = TypeVar("M", bound=BaseModel)
R = TypeVar("R", bound=Record)
_REVISION = re.compile(r"/(\d{8})\.json\Z")


def write_record(store: Store, key: str, record: Record) -> bool:
    """Write a record once: True when written now, False when one was there already."""
    return store.put(key, record.to_bytes())


def read_record(store: Store, key: str, model: type[M]) -> M:
    """The record under a key.

    NotInStore where there is none. NewerSchema where a newer version wrote it (its schema version is newer, or it has
    fields that are not known here): what those say is never left out in silence. FractureSweepError where it cannot be
    read otherwise.
    """
    data = store.get(key)
    if issubclass(model, Record) and (schema_version_in(data) or 0) > _version_of(model):
        raise _newer(key, model)
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        if only_unknown_fields(error):
            raise _newer(key, model) from None
        raise FractureSweepError(
            f"the record {key} does not fit this version's {model.__name__} ({error.error_count()} faults); "
            "it was written by another version: use that version, or a new store"
        ) from None


def _version_of(model: type[Record]) -> int:
    return int(model.model_fields["schema_version"].default)


def _newer(key: str, model: type[BaseModel]) -> NewerSchema:
    return NewerSchema(
        f"the record {key} was written by a newer version than this one's {model.__name__}: upgrade, then replay the "
        "dead letters of this kind"
    )


def find_record(store: Store, key: str, model: type[M]) -> M | None:
    """The record under a key, or None."""
    try:
        return read_record(store, key, model)
    except NotInStore:
        return None


def revisions(store: Store, prefix: str, model: type[M]) -> list[M]:
    """All revisions under a prefix, the oldest first."""
    return [read_record(store, key, model) for key in store.keys(prefix) if _REVISION.search(key)]


def newest(store: Store, prefix: str, model: type[M]) -> M | None:
    """The newest revision under a prefix, or None."""
    numbered = [key for key in store.keys(prefix) if _REVISION.search(key)]
    return read_record(store, numbered[-1], model) if numbered else None


def write_revision(
    store: Store, prefix: str, model: type[R], make: Callable[[int, R | None], R | None]
) -> tuple[R, bool]:
    """Add a revision: `make(number, newest)` returns it, or None to keep the newest. Returns it and whether it is new.

    Two writers at once: the one that comes second sees the other's revision and is asked again.
    """
    while True:
        numbered = [key for key in store.keys(prefix) if _REVISION.search(key)]
        last = read_record(store, numbered[-1], model) if numbered else None
        found = _REVISION.search(numbered[-1]) if numbered else None
        number = int(found.group(1)) + 1 if found else 1
        record = make(number, last)
        if record is None:
            if last is None:
                raise ValueError("there is no revision to keep")
            return last, False
        if write_record(store, keys.revision(prefix, number), record):
            return record, True


def crop_files(store: Store, crop_hash: str, case_id: str) -> tuple[bytes, bytes]:
    """The NRRD files of a case's crop and its mask; Retry where they are not there."""
    try:
        return store.get(keys.case_image(crop_hash, case_id)), store.get(keys.case_mask(crop_hash, case_id))
    except NotInStore:
        raise Retry(
            "the crop of the case is not in the store; if retention dropped it: sweep the study again"
        ) from None
