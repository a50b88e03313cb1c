"""Whether the numbers can be trusted: ``python -m recipes.reliability``."""
