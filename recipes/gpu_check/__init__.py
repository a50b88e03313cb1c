"""Check of numbers and run times on a GPU: ``python -m recipes.gpu_check``."""
