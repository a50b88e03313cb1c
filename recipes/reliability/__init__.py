"""Test the estimates against exact values: ``python -m recipes.reliability``."""
