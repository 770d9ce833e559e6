"""The workload: rows of users, items and three labels, planted so that they can be learnt, in files for all peers.

    python -m benchmarks.peers.data FOLDER [--rows 200000]

A user likes four categories; of those are most of the history and a third of what is shown. Clicks follow from whether
the category is liked, the item's quality, its price against the user's, and how active the user is.
`train.parquet` and `test.parquet` are what peers read; `dataset` is what `joint.prepare parquet` makes of them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from benchmarks.peers.common import CONTEXT, HISTORY, ITEM, LABELS, SIZES, USER, Rows

SHIFT = {"click": -1.5, "long_view": -2.4, "like": -3.4}  # about 32 %, 20 % and 11 % positive
DAYS = {"train": 1_704_067_200, "test": 1_704_153_600}  # the first second of each
LIKED = 4
MAP = {
    "name": "peers",
    "user": "user_id",
    "item": "item_id",
    "request": "row",
    "time": {"column": "time", "unit": "s"},
    "labels": {name: name for name in LABELS},
    "items": {"file": "items.parquet", "key": "item_id", "first_day": {"column": "since", "unit": "s"}},
    "group": {"column": "gender"},
    "features": {
        **{name: {"kind": "id"} for name in (*USER, *CONTEXT) if name != "user_id"},
        **{name: {"kind": "id", "of": "item"} for name in ITEM if name != "item_id"},
        "history": {"kind": "ids", "space": "item_id"},
    },
    "splits": {"valid_days": 0, "test_days": 1},
}


def write(folder: Path, count: int, seed: int = 0) -> None:
    """Write the rows, a tenth as many for the test, and the dataset of them."""
    random = np.random.default_rng(seed)
    items = _items(random)
    made = _rows(random, items, count + count // 10)
    folder.mkdir(parents=True, exist_ok=True)
    for split, first, last in (("train", 0, count), ("test", count, count + count // 10)):
        part = {name: values[first:last] for name, values in made.items()}
        time = DAYS[split] + np.arange(last - first) * 80_000 // (last - first)
        pq.write_table(_table({"row": np.arange(first, last), "time": time} | part), folder / f"{split}.parquet")
    # Peers have a row for every item of a history; ours has the catalogue's, which would lack what was never shown.
    catalogue = {name: values[1:] for name, values in items.items()}
    catalogue["since"] = np.full(ITEM["item_id"], DAYS["train"])
    pq.write_table(_table(catalogue), folder / "items.parquet")
    (folder / "map.yaml").write_text(yaml.safe_dump(MAP))
    files = [folder / f"{split}.parquet" for split in DAYS]
    command = [
        sys.executable,
        "-m",
        "joint.prepare",
        "parquet",
        *files,
        folder / "dataset",
        "--map",
        folder / "map.yaml",
    ]
    subprocess.run(command, check=True)


def _items(random: np.random.Generator) -> Rows:
    """The catalogue by item id, of which there is no 0. Categories take turns, so an item's is known from its id."""
    item = np.arange(ITEM["item_id"] + 1)
    category = (item - 1) % ITEM["category"] + 1
    brand = (category - 1) * 10 + random.integers(1, 11, len(item))
    return {"item_id": item, "category": category, "brand": brand, "price": random.integers(1, 21, len(item))}


def _rows(random: np.random.Generator, items: Rows, count: int) -> Rows:
    users = USER["user_id"] + 1
    of_user = {name: random.integers(1, size + 1, users) for name, size in USER.items() if name != "user_id"}
    liked = random.integers(1, ITEM["category"] + 1, (users, LIKED))
    user = 1 + (random.random(count) ** 1.5 * USER["user_id"]).astype(np.int64)  # some come often
    item = _shown(random, liked[user], share=0.35)
    past = _shown(random, liked[np.repeat(user, HISTORY)], share=0.8).reshape(count, HISTORY)
    context = {name: random.integers(1, size + 1, count) for name, size in CONTEXT.items()}
    found = {"user_id": user, **{name: values[user] for name, values in of_user.items()}, **context}
    found |= {name: values[item] for name, values in items.items()}
    worth = 2.0 * (liked[user] == found["category"][:, None]).any(1)
    worth -= np.abs(2 * of_user["age"][user] - found["price"]) / 16
    for name, spread in {
        "category": 0.8,
        "city": 0.5,
        "hour": 0.4,
        "scene": 0.4,
        "item_id": 0.6,
        "user_id": 0.4,
    }.items():
        worth += random.normal(0, spread, SIZES[name] + 1)[found[name]]
    for name, shift in SHIFT.items():
        found[name] = (random.random(count) < 1 / (1 + np.exp(-worth - shift))).astype(np.int64)
    return found | {"history": past}


def _shown(random: np.random.Generator, liked: np.ndarray, *, share: float) -> np.ndarray:
    """An item for each row of `liked [N, 4]`: this share of a liked category, others of any; popular ones oftener."""
    count = len(liked)
    of_liked = liked[np.arange(count), random.integers(0, LIKED, count)]
    category = np.where(random.random(count) < share, of_liked, random.integers(1, ITEM["category"] + 1, count))
    place = (random.random(count) ** 2 * (ITEM["item_id"] // ITEM["category"])).astype(np.int64)
    return place * ITEM["category"] + category


def _table(columns: Rows) -> pa.Table:
    def column(values: np.ndarray) -> pa.Array:
        ends = np.arange(0, values.size + 1, HISTORY, dtype=np.int32)
        return pa.array(values) if values.ndim == 1 else pa.ListArray.from_arrays(ends, values.ravel())

    return pa.table({name: column(values) for name, values in columns.items()})


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=200_000)
    arguments = parser.parse_args()
    write(arguments.folder, arguments.rows)


if __name__ == "__main__":
    main()
