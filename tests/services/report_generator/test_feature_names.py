from __future__ import annotations

import pytest

from services.report_generator.feature_names import feature_in_words


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("original_shape_Flatness", "Shape: flatness"),
        ("wavelet-HLL_glcm_Correlation", "GLCM: correlation, wavelet HLL"),
        ("log-sigma-3-0-mm-3D_firstorder_90Percentile", "First order: 90 percentile, Laplacian of Gaussian 3.0 mm"),
        ("squareroot_gldm_DependenceEntropy", "GLDM: dependence entropy, squareroot of the image"),
        ("original_glcm_Idmn", "GLCM: IDMN"),
        ("original_glrlm_LongRunHighGrayLevelEmphasis", "GLRLM: long run high gray level emphasis"),
        ("dtl_logit", "Deep features, the network's logit"),
        ("pca_003", "Deep features, component 4"),
        ("something else", "something else"),
        ("<b>_glcm_", "GLCM: , <b> of the image"),
    ],
)
def test_a_feature_is_named_in_words(name: str, words: str) -> None:
    assert feature_in_words(name) == words
