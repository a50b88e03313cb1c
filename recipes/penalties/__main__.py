"""The command ``python -m recipes.penalties``; see :mod:`recipes.penalties.study`."""

from recipes.penalties.study import main

if __name__ == "__main__":
    main()
