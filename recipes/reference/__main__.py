"""The command ``python -m recipes.reference``; see :mod:`recipes.reference.study`."""

from recipes.reference.study import main

if __name__ == "__main__":
    main()
