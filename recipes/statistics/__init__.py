"""Rankings, correlations and their uncertainty."""
