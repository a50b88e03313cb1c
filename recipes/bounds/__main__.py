"""The command ``python -m recipes.bounds``; see :mod:`recipes.bounds.study`."""

from recipes.bounds.study import main

if __name__ == "__main__":
    main()
