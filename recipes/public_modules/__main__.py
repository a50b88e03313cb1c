"""The command ``python -m recipes.public_modules``; see :mod:`recipes.public_modules.study`."""

from recipes.public_modules.study import main

if __name__ == "__main__":
    main()
