"""A replication of the experiment of arXiv 2606.04767: ``python -m recipes.compare``."""
