"""Us and our peers, measured side by side: ``python -m recipes.benchmark``."""
