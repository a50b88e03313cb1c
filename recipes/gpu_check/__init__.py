"""Check numbers and measure times on a GPU: ``python -m recipes.gpu_check``."""
