"""The feature vector of one case: what an extractor writes, and the fusion classifier reads.

It is JSON, so that anything can open it, and it carries its names and the hash of the protocol that made it, so that
a vector is never read under another list or another protocol. Floats are written by `repr`, which round-trips exactly.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from shared.fracture.ids import canonical_json

FeatureKind = Literal["hcr", "dtl"]

SCHEMA: Final = 1

HCR_CLASSES: Final[Mapping[str, str]] = {
    "shape": "Shape",
    "firstorder": "First order",
    "glcm": "GLCM",
    "glrlm": "GLRLM",
    "glszm": "GLSZM",
    "gldm": "GLDM",
    "ngtdm": "NGTDM",
}
"""pyradiomics' classes of hand-crafted features, as people call them."""


class NewerFeatures(ValueError):
    """A feature vector that a newer version wrote."""


def dtl_names(count: int) -> tuple[str, ...]:
    """The names of a network's pooled features in their order: dtl_0000, dtl_0001, …"""
    return tuple(f"dtl_{n:04d}" for n in range(count))


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureVector:
    """Named, finite float64 values under one protocol (`hcr_hash` or `dtl_hash`).

    `provenance` says what does not belong to the protocol but may matter later: the execution provider, versions.
    ValueError for a value that is not finite, a name that stands twice, or a length that does not fit.
    """

    kind: FeatureKind
    names: tuple[str, ...]
    values: NDArray[np.float64]
    protocol_hash: str
    provenance: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in get_args(FeatureKind):
            raise ValueError(f"a feature vector is of kind hcr or dtl, not {self.kind!r}")
        values = np.array(self.values, dtype=np.float64)
        if not self.names or values.shape != (len(self.names),):
            raise ValueError(f"{len(self.names)} names do not fit values of shape {values.shape}")
        if len(set(self.names)) != len(self.names):
            twice = sorted({name for name in self.names if self.names.count(name) > 1})
            raise ValueError(f"feature names stand twice: {', '.join(twice[:5])}")
        bad = [name for name, value in zip(self.names, values, strict=True) if not math.isfinite(value)]
        if bad:
            raise ValueError(f"{len(bad)} features are not finite: {', '.join(bad[:5])}")
        values.setflags(write=False)
        object.__setattr__(self, "names", tuple(self.names))
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "provenance", dict(self.provenance))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FeatureVector) and self.to_bytes() == other.to_bytes()

    def __hash__(self) -> int:
        return hash(self.to_bytes())

    def to_bytes(self) -> bytes:
        """Canonical JSON; equal vectors give equal bytes."""
        return canonical_json(
            {
                "schema": SCHEMA,
                "kind": self.kind,
                "names": list(self.names),
                "values": self.values.tolist(),
                "protocol_hash": self.protocol_hash,
                "provenance": dict(self.provenance),
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> FeatureVector:
        """The vector in canonical JSON bytes; NewerFeatures of a newer version, ValueError when they are not one."""
        try:
            raw: Any = json.loads(data)
        except ValueError as error:
            raise ValueError("a feature vector is JSON, these bytes are not") from error
        if isinstance(raw, dict) and isinstance(raw.get("schema"), int) and raw["schema"] > SCHEMA:
            raise NewerFeatures(f"feature vector schema {raw['schema']} is newer than {SCHEMA}, the newest known here")
        expected = {"schema", "kind", "names", "values", "protocol_hash", "provenance"}
        if not isinstance(raw, dict) or set(raw) != expected:
            raise ValueError(f"a feature vector has the fields {', '.join(sorted(expected))}")
        if raw["schema"] != SCHEMA:
            raise ValueError(f"feature vector schema {raw['schema']!r} is unknown, this version reads {SCHEMA}")
        names, values, provenance = raw["names"], raw["values"], raw["provenance"]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("feature names must be a list of texts")
        if not isinstance(values, list) or not all(type(value) in (int, float) for value in values):
            raise ValueError("feature values must be a list of numbers")
        if not isinstance(raw["protocol_hash"], str) or not isinstance(provenance, dict):
            raise ValueError("protocol_hash must be a text and provenance an object")
        return cls(
            kind=raw["kind"],
            names=tuple(names),
            values=np.array(values, dtype=np.float64),
            protocol_hash=raw["protocol_hash"],
            provenance={str(key): str(value) for key, value in provenance.items()},
        )
