"""How every command ends: a user's mistake is one clear line and exit code 2, an interrupt is 130."""

from __future__ import annotations

import errno
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable

from joint.errors import UserError, first_line

FIRST_RANK_SPEAKS = 30  # seconds that the other ranks leave it
# What gloo says where a rank hangs, or has died.
LOST = ("Timed out waiting", "Connection closed by peer", "Connection reset by peer", "Broken pipe")


def run_command(main: Callable[[], int]) -> int:
    """Run a command's `main`; under torchrun only the first rank speaks of a mistake that all ranks see."""
    _quiet_libraries()
    try:
        return main()
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(error, file=sys.stderr, flush=True)
        else:
            # The first rank says it. A rank that ended before it would make torchrun end the first one unheard;
            # after it, torchrun ends us.
            time.sleep(FIRST_RANK_SPEAKS)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        print(f"{error.filename or 'a file'}: cannot be written ({os.strerror(error.errno)})", file=sys.stderr)
        return 2
    except Exception as error:
        if isinstance(error, RuntimeError) and any(sign in str(error) for sign in LOST):
            said = f"rank {os.environ.get('RANK', '0')}: another rank has died or does not answer"
            print(f"{said} ({first_line(error)})", file=sys.stderr, flush=True)
        if "TORCHELASTIC_ERROR_FILE" in os.environ:  # a crash: torchrun shows the first one's message
            from torch.distributed.elastic.multiprocessing.errors import ErrorHandler

            ErrorHandler().record_exception(error)
        raise


def _quiet_libraries() -> None:
    """Drop the notices that libraries address to their own developers; a run's first lines should be its own."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
