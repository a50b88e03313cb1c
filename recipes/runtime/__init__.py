"""The runtime of recipes: command line, work in several processes, cache of results, timing."""
