"""The experiment of arXiv 2606.04767, redone: ``python -m recipes.compare``."""
