"""Which regulariser buys robustness, and at what price: ``python -m recipes.penalties``."""
