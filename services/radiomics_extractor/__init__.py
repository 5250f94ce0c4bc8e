"""HCR: hand-crafted radiomics features of a crop, by pyradiomics (METHOD 2)."""
