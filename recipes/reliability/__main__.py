"""The command ``python -m recipes.reliability``; see :mod:`recipes.reliability.study`."""

from recipes.reliability.study import main

if __name__ == "__main__":
    main()
