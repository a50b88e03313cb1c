"""Tightness and run time of the upper bounds: ``python -m recipes.bounds``."""
