"""Which organs of TotalSegmentator's label set are which tissue, and which tissues the network tells apart."""

from __future__ import annotations

import re
from typing import Final

TISSUES: Final[tuple[str, ...]] = (
    "air",
    "fat",
    "muscle",
    "lung",
    "airway",
    "artery",
    "vein",
    "heart",
    "liver",
    "spleen",
    "kidney",
    "bowel",
    "fluid",
    "gland",
    "canal",
    "cartilage",
    "other-bone",
    "body",
    "posterior",
    "disc",
    "sacrum",
    "rib",
    "hip",
    "uncut",
)
"""By their value in an anatomy's map. `uncut`: a vertebra whose body and arch are not known apart."""

CODE: Final[dict[str, int]] = {name: value for value, name in enumerate(TISSUES)}

NETWORK_CLASSES: Final[tuple[str, ...]] = ("background", "body", "posterior", "disc", "sacrum", "rib", "hip")
"""By their value in the network's output."""

IGNORED: Final = 255
"""In the place of a class: what the network says there is not judged."""

BONES: Final[tuple[str, ...]] = ("other-bone", "body", "posterior", "sacrum", "rib", "hip", "uncut")

_ORGANS: Final[tuple[tuple[str, str], ...]] = (
    (r"vertebrae_S1|sacrum", "sacrum"),
    (r"vertebrae_.*", "uncut"),  # cut into body and arch afterwards
    (r"rib_.*", "rib"),
    (r"hip_.*", "hip"),
    (r"(femur|humerus|scapula|clavicula)_.*|sternum|skull", "other-bone"),
    (r"costal_cartilages", "cartilage"),
    (r"spinal_cord", "canal"),
    (r"lung_.*", "lung"),
    (r"trachea", "airway"),
    (r"aorta|.*_artery_.*|brachiocephalic_trunk|pulmonary_artery", "artery"),
    (r".*vein.*|.*_vena_.*|.*vena_cava", "vein"),
    (r"heart.*|atrial_appendage_left", "heart"),
    (r"liver", "liver"),
    (r"spleen", "spleen"),
    (r"kidney_(left|right)", "kidney"),
    (r"colon|small_bowel|duodenum|stomach|esophagus", "bowel"),
    (r"urinary_bladder|gallbladder|kidney_cyst_.*", "fluid"),
    (r"autochthon_.*|iliopsoas_.*|gluteus_.*", "muscle"),
    (r"adrenal_gland_.*|pancreas|prostate|thyroid_gland|brain", "gland"),
)


def tissue_of(organ: str) -> str | None:
    """The tissue of an organ of TotalSegmentator's task `total`; None where the set has no such organ."""
    for pattern, tissue in _ORGANS:
        if re.fullmatch(pattern, organ):
            return tissue
    return None


def class_of_tissue() -> tuple[int, ...]:
    """The network's class of each tissue value, or IGNORED."""
    named = {**{name: value for value, name in enumerate(NETWORK_CLASSES)}, "uncut": IGNORED}
    return tuple(named.get(name, 0) for name in TISSUES)
