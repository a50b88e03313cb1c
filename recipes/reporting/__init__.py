"""Tables, pages and records of results."""
