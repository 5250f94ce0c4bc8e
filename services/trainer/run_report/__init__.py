"""The report of a training run: one HTML file that a reviewer can read without anything else."""
