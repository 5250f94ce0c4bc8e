"""The card beside a segmenter's network: what it is given, what it tells apart, and what it was made of.

FOLDER/network.onnx     pictures (n, channels, height, width) float32 → probabilities (n, classes, height, width)
FOLDER/network.json     this card; it holds the network's SHA-256
FOLDER/MODEL_CARD.md    for people
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from shared.fracture.faults import faults_of
from shared.fracture.ids import sha256_hex
from shared.fracture.spine.network_input import NetworkInput

NETWORK_FILE: Final = "network.onnx"
CARD_FILE: Final = "network.json"
MODEL_CARD_FILE: Final = "MODEL_CARD.md"
NEEDED_CLASSES: Final = ("background", "body", "posterior", "sacrum", "rib")
_LARGEST_CARD: Final = 1_000_000


class NetworkCardError(ValueError):
    """A network's folder cannot be used; the text says why."""


class TrainedOn(BaseModel):
    """What a network was fitted on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    anatomies: tuple[str, ...]
    """Name and SHA-256 of each subject's masks."""
    volumes: int
    steps: int
    seed: int
    generator_version: int
    device: str
    loss: float


class NetworkCard(BaseModel):
    """What a segmenter's network is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    name: Annotated[str, Field(min_length=1)]
    version: Annotated[str, Field(min_length=1)]
    network_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    given: NetworkInput
    classes: tuple[str, ...]
    multiple: Annotated[int, Field(ge=1, le=256)]
    """Both sides of a picture have to be a multiple of this."""
    trained_on: TrainedOn

    @model_validator(mode="after")
    def _has_classes(self) -> NetworkCard:
        missing = [name for name in NEEDED_CLASSES if name not in self.classes]
        if missing:
            raise ValueError(f"the network lacks the classes {', '.join(missing)}")
        return self

    def value(self, name: str) -> int:
        """The value of a class."""
        return self.classes.index(name)


def load_network(folder: Path) -> tuple[NetworkCard, bytes]:
    """The card and the bytes of the network in a folder, verified. NetworkCardError where it cannot be used."""
    card_path, network_path = folder / CARD_FILE, folder / NETWORK_FILE
    for path in (card_path, network_path):
        if not path.is_file():
            raise NetworkCardError(f"{folder} holds no {path.name}: give the folder of a segmenter's network")
    if card_path.stat().st_size > _LARGEST_CARD:
        raise NetworkCardError(f"{card_path} is too large for a card")
    try:
        card = NetworkCard.model_validate_json(card_path.read_bytes())
    except ValidationError as error:
        faults = faults_of(error, whole="card")
        raise NetworkCardError(f"{card_path} is no card of a segmenter's network: {faults}") from None
    network = network_path.read_bytes()
    if sha256_hex(network) != card.network_sha256:
        raise NetworkCardError(f"{network_path} is not the file that its card names: its SHA-256 differs")
    return card, network
