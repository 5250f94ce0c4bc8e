"""Typed records in the store: the one place that knows both the vocabulary and the store."""
