"""Reliability of the estimates: ``python -m recipes.reliability``."""
