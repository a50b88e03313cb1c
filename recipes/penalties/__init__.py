"""Comparison of regularisers by robust accuracy and cost: ``python -m recipes.penalties``."""
