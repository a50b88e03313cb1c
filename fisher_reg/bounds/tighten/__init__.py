"""Improvements over the product of the layers' own norms that need the graph."""
