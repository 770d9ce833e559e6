"""MovieLens in any of its layouts -> a dataset. It has no logged stages: a rated movie is `exposed`, that is all.

Protocol. Per user, ratings in time order with ties broken by a seeded hash (three quarters of ML-100K share their
second with another rating of the same user, and file or id order would leak). Everything before the first of the
last min(5, a quarter) positives (rating >= 4) trains; the rest is the test. The same cut once more, on what trains,
leaves the validation part. A training request is a run of up to `run` consecutive ratings; what a user rated after
a cut is one request, made at the cut. Its histories are all that came before it in that order.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from joint.data.dataset import DatasetWriter
from joint.data.movielens_files import Tables, read_tables
from joint.data.ragged import Ragged, draw
from joint.data.requests import Column, Requests
from joint.data.vocabulary import ragged_vocabulary_ids, vocabulary_ids
from joint.errors import DataError
from joint.progress import progress
from joint.schema import SPLITS, Feature, History, Schema, Stage

POSITIVE = 4.0
HELD_OUT = 5  # positives a user, at most
HISTORY = 1000  # newest events a training request keeps; held-out ones keep all, so that nothing is recommended again
CHUNK = 131_072  # requests built and written at a time: their histories are most of a dataset
CITATION = """MovieLens: F. Maxwell Harper and Joseph A. Konstan. 2015. The MovieLens Datasets: History and Context.
ACM Transactions on Interactive Intelligent Systems 5, 4. https://doi.org/10.1145/2827872
Terms of use (GroupLens): research only, no commercial use without permission, no redistribution."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `joint.prepare movielens`."""
    parser.add_argument("path", type=Path, help="where the release is")
    parser.add_argument("out", type=Path, help="folder of the dataset, made by this command")
    parser.add_argument("--run", type=int, default=10, help="consecutive ratings that make a request (default 10)")
    parser.add_argument("--seed", type=int, default=0, help="breaks ties of time (default 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")


def prepare(arguments: argparse.Namespace) -> Schema:
    """What `joint.prepare movielens` does; DataError for a source that is none of the layouts."""
    if arguments.run < 1:
        raise DataError(f"--run is {arguments.run}; expected 1 or more")
    print(CITATION, flush=True)
    return prepare_movielens(
        arguments.path, arguments.out, run=arguments.run, seed=arguments.seed, overwrite=arguments.overwrite
    )


def prepare_movielens(source: Path, out: Path, *, run: int, seed: int, overwrite: bool) -> Schema:
    """Read a MovieLens directory, zip or wheel and write the dataset OUT.

    Args:
        source: holds ML-100K (GroupLens' files or RecBole's), ML-1M, or ML-20M / 25M / 32M at any depth.
        run: consecutive ratings that make one training request.
        seed: of the hash that breaks ties of time.
    """
    writer = DatasetWriter(out, overwrite=overwrite)  # refuses OUT before anything is read
    tables = read_tables(source)
    with writer:
        item_features, catalogue = _catalogue(tables.items, writer)
        user_features, users = _users(tables, writer)
        events = _in_order(tables.ratings, users.index, pd.Index(tables.items.item), seed)
        # Splits are cut per user, so no order of days holds across users: all requests are one day, the log's last.
        day = str(pd.to_datetime(events.timestamp.max(), unit="s").date())
        groups = _activity_groups(events)
        writer.items(catalogue)
        for split in SPLITS:
            for requests in _requests(events, users, groups, split, run if split == "train" else None):
                writer.add(requests, day=day, split=split)
        rating_ids = Feature(name="rating", level="event", kind="id", size=11)
        schema = Schema(
            name="movielens",
            items=len(tables.items),
            features=(*user_features, *item_features, rating_ids),
            histories=(History(name="rated", events=("rating",)), History(name="liked")),
            labels=("rating",),
            stages=("exposed",),
            input_space={},
            provenance={"source": str(source), "run": run, "seed": seed, "ratings": len(events)},
        )
        return writer.finish(schema)


def _in_order(ratings: pd.DataFrame, users: pd.Index, items: pd.Index, seed: int) -> pd.DataFrame:
    """Ratings by user and time, with their split; item and user become indices."""
    events = ratings.assign(user=users.get_indexer(ratings.user), item=items.get_indexer(ratings.item))
    tie = draw(seed, events.user.to_numpy(), events.item.to_numpy())
    events = events.iloc[np.lexsort((tie, events.timestamp, events.user))].reset_index(drop=True)
    test = _after_cut(events.user, events.rating >= POSITIVE)
    valid = _after_cut(events.user, (events.rating >= POSITIVE) & ~test) & ~test
    return events.assign(split=np.select([test, valid], ["test", "valid"], "train"))


def _after_cut(user: pd.Series, positive: pd.Series) -> pd.Series:
    """True from the first of a user's last min(HELD_OUT, a quarter) positives on."""
    count = positive.groupby(user).transform("sum")
    held_out = np.minimum(HELD_OUT, count // 4)
    return positive.groupby(user).cumsum() > count - held_out  # this event is, or follows, a held-out positive


def _requests(
    events: pd.DataFrame, users: pd.DataFrame, groups: np.ndarray, split: str, run: int | None
) -> Iterator[Requests]:
    """The requests of a split in time order, in chunks; `run` ratings a request, or all of a user's when None."""
    place = np.flatnonzero(events.split == split)  # a user's ratings of one split are consecutive
    nth = events.iloc[place].groupby("user").cumcount().to_numpy()
    first = (nth % run == 0) if run else (nth == 0)
    starts = place[first]
    lengths = np.diff(np.append(np.flatnonzero(first), len(place)))
    timestamp = events.timestamp.to_numpy()[starts]
    request_id = draw(users.user_id.to_numpy()[events.user.to_numpy()[starts]], starts).astype(np.int64)
    order = np.lexsort((request_id, timestamp))
    for begin in progress(range(0, len(order), CHUNK), f"writing {split}", unit="chunk"):
        rows = order[begin : begin + CHUNK]
        user = events.user.to_numpy()[starts[rows]]
        candidates = _cut(events.item.to_numpy(np.int32), starts[rows], lengths[rows])
        columns: dict[str, Column] = {
            "request_id": request_id[rows],
            "timestamp": timestamp[rows],
            "group": groups[user],
            **{name: users[name].to_numpy()[user] for name in users},
            **_histories(events, user, starts[rows], HISTORY if run else None),
            "candidates": candidates,
            "stages": candidates.with_values(np.full(len(candidates.values), Stage.EXPOSED, np.uint16)),
            "rating": _cut(events.rating.to_numpy(np.float32), starts[rows], lengths[rows]),
        }
        yield Requests(columns)


def _histories(events: pd.DataFrame, user: np.ndarray, starts: np.ndarray, most: int | None) -> dict[str, Column]:
    """What the user rated, and what the user liked, before event `starts`, oldest first; the newest `most`, or all."""
    begins = np.searchsorted(events.user, user)
    most = most or len(events)
    seen = np.minimum(starts - begins, most)
    items = events.item.to_numpy(np.int32)
    halves = (events.rating.to_numpy() * 2).astype(np.int8)  # half stars are the ids 1 .. 10
    liked = np.flatnonzero(events.rating >= POSITIVE)
    likes_before = np.searchsorted(liked, starts)
    likes = np.minimum(likes_before - np.searchsorted(liked, begins), most)
    return {
        "rated": _cut(items, starts - seen, seen),
        "rated.rating": _cut(halves, starts - seen, seen),
        "liked": _cut(items[liked], likes_before - likes, likes),
    }


def _cut(values: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> Ragged:
    return Ragged(values, np.array([0, len(values)])).slices(starts, lengths)


def _activity_groups(events: pd.DataFrame) -> np.ndarray:
    """Five bins of users by their number of training ratings, the least active first."""
    counts = events[events.split == "train"].groupby("user").size().reindex(range(events.user.max() + 1), fill_value=0)
    rank = counts.rank(method="first").to_numpy(np.int64) - 1
    return (rank * 5 // len(rank)).astype(np.int8)


def _catalogue(items: pd.DataFrame, writer: DatasetWriter) -> tuple[list[Feature], dict[str, Column]]:
    """The item features, and the catalogue's columns."""
    years, year_words = vocabulary_ids(items.year)
    genres, genre_words = ragged_vocabulary_ids(items.genres)
    writer.vocabulary("item_id", list(items.item))
    writer.vocabulary("year", year_words)
    writer.vocabulary("genres", genre_words)
    features = [
        Feature(name="item_id", level="item", kind="id", size=len(items) + 1),
        Feature(name="year", level="item", kind="id", size=len(year_words) + 1),
        Feature(name="genres", level="item", kind="ids", size=len(genre_words) + 1),
    ]
    ids = np.arange(1, len(items) + 1)
    return features, {"item_id": ids, "year": years, "genres": genres, "title": items.title.to_numpy()}


def _users(tables: Tables, writer: DatasetWriter) -> tuple[list[Feature], pd.DataFrame]:
    """Feature ids per user, indexed by the raw user id."""
    raw = pd.DataFrame({"user": np.sort(tables.ratings.user.unique())})
    writer.vocabulary("user_id", list(raw.user))
    ids = pd.DataFrame({"user_id": np.arange(1, len(raw) + 1)}, index=pd.Index(raw.user))
    features = [Feature(name="user_id", level="request", kind="id", size=len(raw) + 1)]
    if tables.users is None:
        return features, ids
    known = tables.users.set_index("user").reindex(raw.user)
    for name in known.columns:
        ids[name], words = vocabulary_ids(known[name])
        writer.vocabulary(name, words)
        features.append(Feature(name=name, level="request", kind="id", size=len(words) + 1))
    return features, ids
