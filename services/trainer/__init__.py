"""The offline half: cohort in, model bundle out. Nothing of it runs in the pipeline."""
