"""DTL: deep transfer-learning features of a crop's sagittal slice, by the bundle's network (METHOD 3)."""
