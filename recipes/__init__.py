"""Runnable recipes: build from a Hydra config, call the library, write files. No mathematics."""
