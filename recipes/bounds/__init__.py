"""How tight the upper bounds are, and how fast: ``python -m recipes.bounds``."""
