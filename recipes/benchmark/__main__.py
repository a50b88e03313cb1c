"""The command ``python -m recipes.benchmark``; see :mod:`recipes.benchmark.study`."""

from recipes.benchmark.study import main

if __name__ == "__main__":
    main()
