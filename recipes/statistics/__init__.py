"""Rank correlations and their uncertainty."""
