"""From λ to distances and robust accuracy: ``python -m recipes.reference``."""
