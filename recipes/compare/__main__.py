"""The command ``python -m recipes.compare``; see :mod:`recipes.compare.study`."""

from recipes.compare.study import main

if __name__ == "__main__":
    main()
