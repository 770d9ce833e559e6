"""Numbers of versions: none is taken twice, and what cannot be named leaves nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from joint.errors import UserError
from joint.exporting.versions import new_version


def test_a_number_follows_every_number_that_is_there(tmp_path: Path) -> None:
    for name in ("2", "10"):  # no manifest in them: copied halfway, say
        (tmp_path / name).mkdir()
    (tmp_path / "11").touch()
    (tmp_path / "²").mkdir()
    with new_version(tmp_path) as (_, number):
        assert number == 12
    assert (tmp_path / "12").is_dir()


def finish_after_another(out: Path) -> None:
    with new_version(out) as (folder, number):
        (folder / "file").touch()
        (out / str(number)).mkdir()
        (out / str(number) / "file").touch()


def test_two_at_once_do_not_mix(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="1: cannot be given its name"):
        finish_after_another(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["1"]
