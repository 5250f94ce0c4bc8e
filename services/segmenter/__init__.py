"""segmenter: gives a series its vertebra masks. Until automatic masks are built, those that came with it."""
