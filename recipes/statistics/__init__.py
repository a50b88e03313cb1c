"""Orders, correlations and their uncertainty."""
