"""Test whether the spectral bounds rank networks by their sensitivity: ``python -m recipes.rank``."""
