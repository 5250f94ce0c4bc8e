"""From a series with its masks to one case a vertebra: guards, plan and 1 mm crop (METHOD 1 and 10)."""
