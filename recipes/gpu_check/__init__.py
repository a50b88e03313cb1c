"""Numbers and times of a GPU: ``python -m recipes.gpu_check``."""
