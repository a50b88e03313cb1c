"""Improvements over the product of the norms of the layers that need the graph."""
