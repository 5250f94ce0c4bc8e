"""Stored values of one instance, decoded, in HU.

Decoders with licences that suit Apache-2.0: python-gdcm (BSD), pylibjpeg-openjpeg (MIT), pyjpegls (MIT). One decoder a
syntax: GDCM aborts the whole process on damaged JPEG 2000, so it gets JPEG alone, and no GPL decoder that happens to
be installed is ever asked. What they cannot decode (12-bit lossy JPEG Extended, deflated frames, …) is refused by the
syntax's name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.pixels.decoders.base import get_decoder

from services.dicom_ingest.decoding import DecoderDied, read_values, read_values_apart
from services.dicom_ingest.headers import UNCOMPRESSED, InstanceHeader, PlaneHeader, syntax_name
from shared.fracture.volume import AIR_HU

DECODERS: Final[Mapping[str, str]] = {
    "1.2.840.10008.1.2.5": "pydicom",
    **dict.fromkeys((f"1.2.840.10008.1.2.4.{n}" for n in (50, 51, 57, 70)), "gdcm"),
    **dict.fromkeys((f"1.2.840.10008.1.2.4.{n}" for n in (80, 81)), "pyjpegls"),
    **dict.fromkeys((f"1.2.840.10008.1.2.4.{n}" for n in (90, 91, 201, 202, 203)), "pylibjpeg"),
}
"""pydicom's name of the decoder of each compressed transfer syntax."""

_INT16: Final = np.iinfo(np.int16)


class CannotDecode(Exception):
    """Pixels that cannot be had. The reason quotes no value of the header but the transfer syntax's name."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    @classmethod
    def by_syntax(cls, transfer_syntax_uid: str) -> CannotDecode:
        """No decoder for this transfer syntax."""
        return cls(f"the transfer syntax {syntax_name(transfer_syntax_uid)} cannot be decoded")


def can_decode(transfer_syntax_uid: str) -> bool:
    """Whether a decoder for this transfer syntax is installed."""
    if transfer_syntax_uid in UNCOMPRESSED:
        return True
    decoder = DECODERS.get(transfer_syntax_uid)
    return decoder is not None and decoder in get_decoder(pydicom.uid.UID(transfer_syntax_uid)).available_plugins


def stored_values(instance: InstanceHeader) -> NDArray[np.generic]:
    """The stored values of an instance without faults, shape (frames, rows, columns). Raises CannotDecode."""
    syntax = instance.transfer_syntax_uid
    if not can_decode(syntax):
        raise CannotDecode.by_syntax(syntax)
    read = read_values if syntax in UNCOMPRESSED else read_values_apart
    try:
        values = read(instance.path, syntax, DECODERS.get(syntax, ""))
    except MemoryError:
        raise CannotDecode("the pixel data needs more memory than there is") from None
    except DecoderDied:
        raise CannotDecode(
            f"the decoder died of the pixel data: transfer syntax {syntax_name(syntax)}, damaged"
        ) from None
    except Exception:  # decoders raise what they like, with paths and values in the text
        raise CannotDecode(_refused(syntax)) from None
    shape = (len(instance.frames), instance.shared.rows or 0, instance.shared.columns or 0)
    if values.size != int(np.prod(shape)):
        raise CannotDecode("the pixel data is of another size than Rows and Columns say")
    reshaped: NDArray[np.generic] = values.reshape(shape)
    return reshaped


def _refused(syntax: str) -> str:
    if syntax in UNCOMPRESSED:
        return f"the pixel data cannot be read as {syntax_name(syntax)}"
    return f"the pixel data cannot be decoded: transfer syntax {syntax_name(syntax)}, or it is damaged"


def to_hu(
    values: NDArray[Any], plane: PlaneHeader, *, padding: int | None, padding_limit: int | None
) -> NDArray[np.int16]:
    """Stored values of one frame → HU: slope, intercept, padding → AIR_HU, rounded and clipped to int16."""
    slope = 1.0 if plane.rescale_slope is None else plane.rescale_slope
    intercept = 0.0 if plane.rescale_intercept is None else plane.rescale_intercept
    outside = _padded(values, padding, padding_limit)
    if slope == 1.0 and intercept == int(intercept) and abs(intercept) < 1e6:
        hu = values.astype(np.int32) + np.int32(intercept)
    else:
        hu = np.rint(values.astype(np.float64) * slope + intercept)
    clipped: NDArray[np.int16] = np.clip(hu, _INT16.min, _INT16.max).astype(np.int16)
    if outside is not None:
        clipped[outside] = AIR_HU
    return clipped


def _padded(values: NDArray[Any], padding: int | None, limit: int | None) -> NDArray[np.bool_] | None:
    """Where the stored value is padding (PS3.3 C.7.5.1.1.2). A value that the dtype cannot hold is read modulo 2^n."""
    if padding is None:
        return None
    ends = [_wrapped(end, values.dtype) for end in (padding, padding if limit is None else limit)]
    outside: NDArray[np.bool_] = (values >= min(ends)) & (values <= max(ends))
    return outside


def _wrapped(value: int, dtype: np.dtype[Any]) -> int:
    info = np.iinfo(dtype)
    if info.min <= value <= info.max:
        return value
    return int((value - int(info.min)) % (int(info.max) - int(info.min) + 1) + int(info.min))


def decode_hu(instance: InstanceHeader, frames: Sequence[int] | None = None) -> NDArray[np.int16]:
    """The frames of an instance (all, or those named) in HU, shape (frames, rows, columns). Raises CannotDecode."""
    values = stored_values(instance)
    shared = instance.shared
    wanted = range(len(instance.frames)) if frames is None else frames
    return np.stack(
        [
            to_hu(
                values[number],
                instance.frames[number],
                padding=shared.pixel_padding_value,
                padding_limit=shared.pixel_padding_limit,
            )
            for number in wanted
        ]
    )
