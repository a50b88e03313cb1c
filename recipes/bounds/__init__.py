"""Tightness and speed of the upper bounds: ``python -m recipes.bounds``."""
