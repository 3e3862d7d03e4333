"""``deepthin.tasks.training.Training``: what a user's own training function is handed (docs/comparison.md)."""

from deepthin.lab.tasks.training import Training

__all__ = ["Training"]
