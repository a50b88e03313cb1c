"""Compare regularisers: robust accuracy, accuracy and training time: ``python -m recipes.penalties``."""
