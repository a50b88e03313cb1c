"""Benchmark of this package and others: ``python -m recipes.benchmark``."""
