"""Attacks of kept libraries on classifiers of pixels in [0, 1]."""
