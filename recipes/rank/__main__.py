"""The command ``python -m recipes.rank``; see :mod:`recipes.rank.study`."""

from recipes.rank.study import main

if __name__ == "__main__":
    main()
