"""How every command ends: a user's mistake is one clear line and exit code 2, an interrupt is 130."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable

from joint.errors import UserError


def run_command(main: Callable[[], int]) -> int:
    """Run a command's `main`; under torchrun only the first rank speaks of a mistake that all ranks see."""
    _quiet_libraries()
    try:
        return main()
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(error, file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        return 130


def _quiet_libraries() -> None:
    """Drop the notices that libraries address to their own developers; a run's first lines should be its own."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
