"""Runnable recipes: they build objects from a Hydra config, call the library, and write files."""
