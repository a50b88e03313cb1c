"""The command ``python -m recipes.gpu_check``; see :mod:`recipes.gpu_check.study`."""

from recipes.gpu_check.study import main

if __name__ == "__main__":
    main()
