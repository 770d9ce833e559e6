"""New items for an export: vectors by its own item tower, a version of its own, the old answers unchanged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from joint.errors import UserError
from joint.export import main
from joint.serving import Recommender
from joint.serving.check import check

NEW = {
    "item_id": ["novel", "twin of item 3"],
    "tags": [[1, 5], [2]],
    "price": [0.25, 0.5],
    "image": [[1.0, 0.0, -1.0, 2.0], [0.0, 0.0, 0.0, 0.0]],
}


def write(path: Path, **changes: Any) -> Path:
    pq.write_table(pa.table(NEW | changes), path)
    return path


def test_new_items_join_the_next_version(
    exported: Path,
    copied: Path,
    tmp_path: Path,
    asked: Callable[..., dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    (copied / "stray").symlink_to(tmp_path / "elsewhere")
    (copied / "note.txt").write_text("of no export")
    path = write(tmp_path / "new.parquet", **{"first_day.shelf": ["2024-05-01", None]})
    assert main([str(tmp_path), "--items", str(path)]) == 0
    assert "2 items added, 2 of them of an id that training did not know" in capsys.readouterr().out
    assert check(tmp_path / "2")["overlap"] == 1.0
    assert "# shop, version 2" in (tmp_path / "2/README.md").read_text()
    assert "62 items" in (tmp_path / "2/README.md").read_text()
    assert sorted(p.name for p in (tmp_path / "2").iterdir()) == sorted(p.name for p in exported.iterdir())
    old, new = Recommender(exported), Recommender(tmp_path)
    assert (old.version, new.version) == ("shop/1", "shop/2")
    assert len(new.items) == len(old.items) + 2
    np.testing.assert_array_equal(new.items.vectors["v"][:-2], old.items.vectors["v"])
    np.testing.assert_allclose(new.item_vectors(np.array([60, 61]))["v"], new.items.vectors["v"][60:], atol=1e-6)
    everything = Recommender(tmp_path, quotas={"retrieval": 70, "pre_ranking": 70})
    then, now = (set(everything.recommend(asked(day=day), 70).ids) for day in ("2024-04-30", "2024-05-01"))
    assert now - then == {"novel"}  # the other one never joins the shelf
    past = {"viewed": ["novel"], "viewed.device": [1], "viewed.seconds": [0.5], "viewed.competitors": [[]]}
    nothing = {name: [] for name in past}
    assert everything.recommend(asked(**past)) != everything.recommend(asked(**nothing))
    assert old.recommend(asked(**past)) == old.recommend(asked(**nothing))


@pytest.mark.parametrize("option", [["--with-teacher"], ["--heads", "retrieval"], ["--index", "ivf"]])
def test_options_of_a_run_are_refused_beside_items(exported: Path, option: list[str]) -> None:
    with pytest.raises(UserError, match=f"{option[0]}: not with --items"):
        main([str(exported), "--items", "new.parquet", *option])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"item_id": ["novel", "item 3"]}, "column item_id: expected new items, each once; found 'item 3'"),
        ({"item_id": ["novel", "novel"]}, "expected new items, each once; found 'novel'"),
        ({"item_id": ["novel", None]}, "expected new items, each once; found None"),
        ({name: values[:0] for name, values in NEW.items()}, "no rows; expected an item a row"),
        ({"price": [1e39, 0.5]}, "price: expected a number that is finite as float32"),
        ({"price": ["a", "b"]}, r"price: expected a number .*, found 'a'"),
        ({"first_day": ["soon", None]}, "column first_day: expected days as YYYY-MM-DD"),
        ({"first_day": ["today", None]}, "column first_day: expected days as YYYY-MM-DD"),
        ({"first_day": ["NaT", None]}, "column first_day: expected days as YYYY-MM-DD"),
        ({"first_day": [20240501, 20240501]}, "column first_day: expected days as YYYY-MM-DD"),
        ({"first_day.shelv": ["2024-05-01", None]}, "column first_day.shelv: of no pool; expected first_day, "),
    ],
)
def test_wrong_items_leave_nothing(copied: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "new.parquet", **changes)
    with pytest.raises(UserError, match=message):
        main([str(copied), "--items", str(path), "--out", str(tmp_path / "out")])
    pq.write_table(pa.table({name: NEW[name] for name in NEW if name != "price"}), path)
    with pytest.raises(UserError, match="no column price; expected item_id"):
        main([str(copied), "--items", str(path), "--out", str(tmp_path / "out")])
    assert not [*(tmp_path / "out").glob("*")]
