"""Fan-in: both feature vectors of a case and the bundle give acute or chronic (METHOD 5, 6, 10)."""
