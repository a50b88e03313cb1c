"""What other packages say while a recipe runs, and nobody needs to read."""

from __future__ import annotations

import logging
import warnings

_PACKAGES = ("pytorch_lightning", "lightning_fabric", "lightning.pytorch", "lightning.fabric")


def quiet() -> None:
    """Silence the greetings and hints of Lightning, foolbox and ``torch.jit``; warnings of this project stay.

    Where the package ``lightning`` is installed, too, they come by whichever was imported last. That import sets the
    levels of the packages' own loggers anew, so that the loggers of their modules are set as well.
    """
    for name in _PACKAGES:
        for module in ("", ".utilities.rank_zero"):
            logging.getLogger(name + module).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning|lightning|foolbox")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.jit")
    warnings.filterwarnings("default", message="Fisher")  # of our callbacks, which Lightning's code calls
