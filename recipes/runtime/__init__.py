"""How a recipe runs: its command line, its work in several processes, what it keeps, its clock."""
