"""Small changes of a picture that leave the vertebra what it is, so that the network does not learn its exact place.

Shifts, slight turns and scalings, and noise. Never a mirror image: front and back, upper and lower end-plate are not
alike, and the signs are told apart by where they lie.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

SHIFT_SHARE: Final = 0.05
"""Largest shift, as a share of the picture's side."""
TURN_DEGREES: Final = 8.0
SCALE: Final = 0.08
NOISE_SD: Final = 0.1
"""Largest SD of the added noise, in SDs of the picture."""
_STREAM: Final = 2


def augmented(picture: NDArray[np.float32], *, seed: int, epoch: int, row: int) -> NDArray[np.float32]:
    """The picture (size, size) changed, mean 0 and SD 1 again; it depends on the picture, seed, epoch and row alone."""
    rng = np.random.default_rng([seed, _STREAM, epoch, row])
    turn = math.radians(rng.uniform(-TURN_DEGREES, TURN_DEGREES))
    scale = math.exp(rng.uniform(-SCALE, SCALE))
    shift = rng.uniform(-SHIFT_SHARE, SHIFT_SHARE, size=2) * np.array(picture.shape)
    noise_sd = np.float32(rng.uniform(0, NOISE_SD))
    matrix = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]]) / scale
    centre = (np.array(picture.shape) - 1) / 2
    offset = centre + shift - matrix @ centre
    changed = ndimage.affine_transform(picture, matrix, offset=offset, order=1, mode="nearest")
    changed = changed + noise_sd * rng.standard_normal(picture.shape, dtype=np.float32)
    return np.asarray((changed - changed.mean()) / max(float(changed.std()), 1e-6), dtype=np.float32)
