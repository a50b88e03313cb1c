"""The command ``python -m recipes.compare_penalties``, the longer name of ``python -m recipes.penalties``."""

from recipes.penalties.study import main

if __name__ == "__main__":
    main()
