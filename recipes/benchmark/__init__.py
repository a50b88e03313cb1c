"""Cost and error of this package and of other implementations: ``python -m recipes.benchmark``."""
