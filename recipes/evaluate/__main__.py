"""The command ``python -m recipes.evaluate``; see :mod:`recipes.evaluate.study`."""

from recipes.evaluate.study import main

if __name__ == "__main__":
    main()
