"""An audit of one classifier: ``python -m recipes.evaluate``."""
