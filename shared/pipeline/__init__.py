"""Moves and keeps bytes: broker, store, worker, settings, metrics. It knows no radiology."""
