"""The infrastructure of a recipe: command line, parallel tasks, cache of results, timing."""
