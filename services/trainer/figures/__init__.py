"""Figures of a training run: each a table of numbers out of RunResult, and a drawing of that table and nothing else."""
