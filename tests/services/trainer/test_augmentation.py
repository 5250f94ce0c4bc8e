import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.trainer.augmentation import augmented

pytestmark = pytest.mark.trainer


def _cornered(size: int) -> np.ndarray:
    """A picture whose upper left quarter has a bright spot."""
    picture = np.zeros((size, size), dtype=np.float32)
    picture[size // 5 : 2 * size // 5, size // 5 : 2 * size // 5] = 10
    return (picture - picture.mean()) / picture.std()


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), epoch=st.integers(0, 200), row=st.integers(0, 5000))
def test_a_changed_picture_is_normalised_and_never_mirrored(seed: int, epoch: int, row: int) -> None:
    picture = _cornered(32)

    changed = augmented(picture, seed=seed, epoch=epoch, row=row)

    assert changed.dtype == np.float32
    assert abs(float(changed.mean())) < 1e-5
    assert abs(float(changed.std()) - 1) < 1e-4
    quarters = [changed[:16, :16], changed[:16, 16:], changed[16:, :16], changed[16:, 16:]]
    assert np.argmax([quarter.mean() for quarter in quarters]) == 0


def test_the_change_depends_on_seed_epoch_and_row() -> None:
    picture = _cornered(32)
    reference = augmented(picture, seed=1, epoch=2, row=3)

    again = augmented(picture.copy(), seed=1, epoch=2, row=3)
    others = [
        augmented(picture, seed=seed, epoch=epoch, row=row) for seed, epoch, row in ((2, 2, 3), (1, 3, 3), (1, 2, 4))
    ]

    assert np.array_equal(again, reference)
    assert not any(np.array_equal(other, reference) for other in others)


def test_a_picture_without_contrast_stays_finite() -> None:
    assert np.isfinite(augmented(np.zeros((32, 32), dtype=np.float32), seed=1, epoch=0, row=0)).all()
