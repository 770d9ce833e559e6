"""How commands end: one line for what the machine refuses, nothing for a reader who has seen enough."""

import errno
import os
import subprocess
import sys

import pytest

from joint.commands import run_command
from joint.errors import DataError


def raising(error: BaseException):
    def main() -> int:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (DataError("x.parquet: not whole"), 2, "x.parquet: not whole\n"),
        (
            OSError(errno.ENOSPC, "No space left", "out/part"),
            2,
            "out/part: cannot be written (No space left on device)\n",
        ),
        (OSError(errno.EROFS, "?"), 2, "a file: cannot be written (Read-only file system)\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_a_mistake_of_the_user_or_the_machine_is_one_line(capfd, error, code, says):
    assert run_command(raising(error)) == code
    assert capfd.readouterr().err == says


def test_what_is_our_own_mistake_is_not_hidden():
    with pytest.raises(OSError, match="odd"):
        run_command(raising(OSError(errno.EBADF, "odd")))


def test_a_reader_may_stop_reading():
    code = "from joint.commands import run_command\nraise SystemExit(run_command(lambda: print('x' * 10**6) or 0))"
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    command = f'{sys.executable} -c "{code}" | head -c 1'
    found = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment)
    assert (found.stdout, found.stderr) == ("x", "")
