"""MovieLens in any of its layouts -> a dataset. It has no logged stages: a rated movie is `exposed`, that is all.

Protocol. Per user, ratings in time order with ties broken by a seeded hash (three quarters of ML-100K share their
second with another rating of the same user, and file or id order would leak). Everything before the first of the
last min(5, a quarter) positives (rating >= 4) trains; the rest is the test. The same cut once more, on what trains,
leaves the validation part. A training request is a run of up to `run` consecutive ratings; what a user rated after
a cut is one request, made at the cut. Its histories are all that came before it in that order.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from joint.data.dataset import DatasetWriter, ragged_vocabulary_ids, vocabulary_ids
from joint.data.ragged import Ragged, draw, offsets_of
from joint.data.requests import Column, Requests
from joint.errors import DataError
from joint.schema import PARTS, Feature, History, Schema, Stage

POSITIVE = 4.0
HELD_OUT = 5  # positives a user, at most
HISTORY = 1000  # newest events a request keeps; no user of ML-100K has more
CITATION = """MovieLens: F. Maxwell Harper and Joseph A. Konstan. 2015. The MovieLens Datasets: History and Context.
ACM Transactions on Interactive Intelligent Systems 5, 4. https://doi.org/10.1145/2827872
Terms of use (GroupLens): research only, no commercial use without permission, no redistribution."""


@dataclass(frozen=True)
class Tables:
    """One MovieLens release: ratings (user, item, rating, timestamp), items and, where there are any, users."""

    ratings: pd.DataFrame
    items: pd.DataFrame
    users: pd.DataFrame | None


def prepare_movielens(source: Path, out: Path, *, run: int, seed: int, overwrite: bool) -> Schema:
    """Read a MovieLens directory, zip or wheel and write the dataset OUT.

    Args:
        source: holds ML-100K (GroupLens' files or RecBole's), ML-1M, or ML-20M / 25M / 32M at any depth.
        run: consecutive ratings that make one training request.
        seed: of the hash that breaks ties of time.
    """
    with DatasetWriter(out, overwrite=overwrite) as writer:
        tables = read_tables(source)
        item_features, catalogue, item_index = _catalogue(tables.items, writer)
        user_features, users = _users(tables, writer)
        events = _in_order(tables.ratings, users.index, item_index, seed)
        day = str(pd.to_datetime(events.timestamp.max(), unit="s").date())
        groups = _activity_groups(events)
        writer.items(catalogue)
        for split in PARTS:
            requests = _requests(events, users, groups, split, run if split == "train" else None)
            writer.add(requests, day=day, split=split)
        rating_ids = Feature(name="rating", level="event", kind="id", size=11)
        schema = Schema(
            name="movielens",
            items=len(item_index),
            features=(*user_features, *item_features, rating_ids),
            histories=(History(name="rated", events=("rating",)), History(name="liked")),
            labels=("rating",),
            stages=("exposed",),
            input_space={},
            parts=(),
            provenance={"source": str(source), "run": run, "seed": seed, "ratings": len(events)},
        )
        return writer.finish(schema)


def _in_order(ratings: pd.DataFrame, users: pd.Index, items: pd.Index, seed: int) -> pd.DataFrame:
    """Ratings by user and time, with their split and their place; item and user become indices."""
    events = ratings.assign(user=users.get_indexer(ratings.user), item=items.get_indexer(ratings.item))
    if (events.item < 0).any():
        raise DataError(f"ratings: {int((events.item < 0).sum())} name a movie that the catalogue lacks")
    tie = draw(seed, events.user.to_numpy(), events.item.to_numpy())
    events = events.iloc[np.lexsort((tie, events.timestamp, events.user))].reset_index(drop=True)
    twice = events.duplicated(["user", "item"])
    if twice.any():
        first = ratings.iloc[int(twice.to_numpy().argmax())]
        raise DataError(f"ratings: {int(twice.sum())} rate a movie again (first: user {first.user}); expected one each")
    test = _after_cut(events.user, events.rating >= POSITIVE)
    valid = _after_cut(events.user, (events.rating >= POSITIVE) & ~test) & ~test
    return events.assign(split=np.select([test, valid], ["test", "valid"], "train"))


def _after_cut(user: pd.Series, positive: pd.Series) -> pd.Series:
    """True from the first of a user's last min(HELD_OUT, a quarter) positives on."""
    count = positive.groupby(user).transform("sum")
    held_out = np.minimum(HELD_OUT, count // 4)
    reached = positive.groupby(user).cumsum() > count - held_out  # this event is, or follows, a held-out positive
    return reached & (held_out > 0)


def _requests(events: pd.DataFrame, users: pd.DataFrame, groups: np.ndarray, split: str, run: int | None) -> Requests:
    """The requests of a split; `run` ratings a request, or all of a user's when None."""
    place = np.flatnonzero(events.split == split)  # a user's ratings of one split are consecutive
    user = events.user.to_numpy()[place]
    nth = events[events.split == split].groupby("user").cumcount().to_numpy()
    first = (nth % run == 0) if run else (nth == 0)
    starts = place[first]
    lengths = np.diff(np.append(np.flatnonzero(first), len(place)))
    user = user[first]
    candidates = Ragged(events.item.to_numpy(np.int32), np.zeros(1, np.int64)).slices(starts, lengths)
    rating = candidates.with_values(events.rating.to_numpy(np.float32)[_index(starts, lengths)])
    columns: dict[str, Column] = {
        "request_id": draw(users.user_id.to_numpy()[user], starts).astype(np.int64),
        "timestamp": events.timestamp.to_numpy(np.int64)[starts],
        "group": groups[user],
        **{name: users[name].to_numpy()[user] for name in users},
        **_histories(events, user, starts),
        "candidates": candidates,
        "stages": candidates.with_values(np.full(len(candidates.values), Stage.EXPOSED, np.uint16)),
        "rating": rating,
    }
    order = np.lexsort((columns["request_id"], columns["timestamp"]))
    return Requests(columns).take(order)


def _histories(events: pd.DataFrame, user: np.ndarray, starts: np.ndarray) -> dict[str, Column]:
    """What the user rated, and what the user liked, before event `starts`; the newest HISTORY, oldest first."""
    begins = np.searchsorted(events.user, user)
    seen = np.minimum(starts - begins, HISTORY)
    items = Ragged(events.item.to_numpy(np.int32), np.zeros(1, np.int64))
    halves = (events.rating.to_numpy() * 2).astype(np.int8)  # half stars are the ids 1 .. 10
    rated = items.slices(starts - seen, seen)
    liked = np.flatnonzero(events.rating >= POSITIVE)
    likes_before = np.searchsorted(liked, starts)
    likes = np.minimum(likes_before - np.searchsorted(liked, begins), HISTORY)
    return {
        "rated": rated,
        "rated.rating": rated.with_values(halves[_index(starts - seen, seen)]),
        "liked": Ragged(items.values[liked], items.offsets).slices(likes_before - likes, likes),
    }


def _index(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return np.arange(lengths.sum()) + np.repeat(starts - offsets_of(lengths)[:-1], lengths)


def _activity_groups(events: pd.DataFrame) -> np.ndarray:
    """Five bins of users by their number of training ratings, the least active first."""
    counts = events[events.split == "train"].groupby("user").size().reindex(range(events.user.max() + 1), fill_value=0)
    return pd.qcut(counts.rank(method="first"), 5, labels=False).to_numpy(np.int8)


def _catalogue(items: pd.DataFrame, writer: DatasetWriter) -> tuple[list[Feature], dict[str, Column], pd.Index]:
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
    columns = {
        "item_id": np.arange(1, len(items) + 1),
        "year": years,
        "genres": genres,
        "title": items.title.to_numpy(),
    }
    return features, columns, pd.Index(items.item)


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


# --- the layouts ---------------------------------------------------------------------------------------------------


def read_tables(source: Path) -> Tables:
    """Find and read the one MovieLens release inside a directory, a zip or a wheel.

    Raises:
        DataError: nothing known is inside, a file is not readable, or a column is missing or holds no numbers.
    """
    files = _files(source)
    for marker, reader in _LAYOUTS.items():
        found = [name for name in files if Path(name).name == marker]
        if found:
            folder = str(Path(found[0]).parent)
            prefix = "" if folder == "." else f"{folder}/"
            return _checked(source, reader(lambda name, prefix=prefix: _open(files, source, prefix + name)))
    raise DataError(f"{source}: no MovieLens found; expected one of {', '.join(_LAYOUTS)} in it, at any depth")


def _files(source: Path) -> dict[str, Callable[[], bytes]]:
    if source.is_dir():
        return {str(p.relative_to(source)): p.read_bytes for p in sorted(source.rglob("*")) if p.is_file()}
    if not source.is_file():
        raise DataError(f"{source}: not found; expected a MovieLens directory, zip or wheel")
    if not zipfile.is_zipfile(source):
        raise DataError(f"{source}: neither a directory nor a whole zip archive")
    archive = zipfile.ZipFile(source)
    return {name: lambda name=name: archive.read(name) for name in archive.namelist()}  # type: ignore[misc]


def _open(files: dict[str, Callable[[], bytes]], source: Path, name: str) -> io.BytesIO:
    if name not in files:
        raise DataError(f"{source}: {name} is missing")
    try:
        return io.BytesIO(files[name]())
    except (OSError, zipfile.BadZipFile, EOFError) as error:
        raise DataError(f"{source}: {name} cannot be read ({error})") from error


Open = Callable[[str], io.BytesIO]


def _recbole(open_: Open) -> Tables:
    def read(name: str) -> pd.DataFrame:
        table = pd.read_csv(open_(name), sep="\t", dtype=str, keep_default_na=False)
        return table.rename(
            columns=lambda c: {"user_id": "user", "item_id": "item"}.get(c.split(":")[0], c.split(":")[0])
        )

    items = read("ml-100k.item").rename(columns={"movie_title": "title", "release_year": "year"})
    return Tables(read("ml-100k.inter"), items.assign(genres=items["class"].str.split()), read("ml-100k.user"))


def _grouplens_100k(open_: Open) -> Tables:
    ratings = pd.read_csv(open_("u.data"), sep="\t", names=["user", "item", "rating", "timestamp"])
    genres = pd.read_csv(open_("u.genre"), sep="|", names=["genre", "id"])["genre"].to_numpy()
    items = pd.read_csv(open_("u.item"), sep="|", header=None, encoding="latin-1")
    flags = items.iloc[:, 5 : 5 + len(genres)].to_numpy(bool)
    names = pd.Series([list(genres[row]) for row in flags])
    title, year = _title_and_year(items[1])
    users = pd.read_csv(open_("u.user"), sep="|", names=["user", "age", "gender", "occupation", "zip_code"], dtype=str)
    return Tables(ratings, pd.DataFrame({"item": items[0], "title": title, "year": year, "genres": names}), users)


def _one_million(open_: Open) -> Tables:
    def read(name: str, columns: list[str]) -> pd.DataFrame:
        return pd.read_csv(open_(name), sep="::", names=columns, engine="python", encoding="latin-1", dtype=str)

    items = read("movies.dat", ["item", "title", "genres"])
    title, year = _title_and_year(items.title)
    items = items.assign(title=title, year=year, genres=items.genres.str.split("|"))
    users = read("users.dat", ["user", "gender", "age", "occupation", "zip_code"])
    return Tables(read("ratings.dat", ["user", "item", "rating", "timestamp"]), items, users)


def _csv(open_: Open) -> Tables:
    names = {"userId": "user", "movieId": "item"}
    items = pd.read_csv(open_("movies.csv")).rename(columns=names)
    title, year = _title_and_year(items.title)
    genres = items.genres.where(items.genres != "(no genres listed)", "").map(lambda g: g.split("|") if g else [])
    return Tables(
        pd.read_csv(open_("ratings.csv")).rename(columns=names),
        items.assign(title=title, year=year, genres=genres),
        None,
    )


_LAYOUTS: dict[str, Callable[[Open], Tables]] = {
    "ml-100k.inter": _recbole,
    "u.data": _grouplens_100k,
    "ratings.dat": _one_million,
    "ratings.csv": _csv,
}


def _title_and_year(titles: pd.Series) -> tuple[pd.Series, pd.Series]:
    parts = titles.str.extract(r"^(.*?)\s*(?:\((\d{4})\)\s*)?$")
    return parts[0], parts[1]


def _checked(source: Path, tables: Tables) -> Tables:
    """Columns as numbers, ages in seven groups, zip codes by their first digit; DataError where a value is none."""
    ratings = tables.ratings
    for column, lowest, highest in (
        ("user", 0, 2**62),
        ("item", 0, 2**62),
        ("rating", 0.5, 5),
        ("timestamp", 0, 2**40),
    ):
        if column not in ratings:
            raise DataError(f"{source}: ratings have no column {column}; found: {', '.join(ratings.columns)}")
        numbers = pd.to_numeric(ratings[column], errors="coerce")
        wrong = ~numbers.between(lowest, highest)
        if wrong.any():
            row = int(wrong.to_numpy().argmax())
            raise DataError(
                f"{source}: ratings row {row + 1}: {column} is {ratings[column].iloc[row]!r}, not a number of {lowest} to {highest}"
            )
        ratings = ratings.assign(**{column: numbers.astype("float32" if column == "rating" else "int64")})
    if ratings.empty:
        raise DataError(f"{source}: there is no rating in it")
    items = tables.items.assign(
        item=pd.to_numeric(tables.items.item), year=pd.to_numeric(tables.items.year, errors="coerce")
    )
    users = tables.users
    if users is not None:
        age = pd.cut(pd.to_numeric(users.age), [0, 17, 24, 34, 44, 49, 55, 200], labels=False)
        users = users.assign(user=pd.to_numeric(users.user), age=age, zip_code=users.zip_code.str[:1])
        users = users[["user", "age", "gender", "occupation", "zip_code"]]
    return Tables(
        ratings[["user", "item", "rating", "timestamp"]],
        items[["item", "title", "year", "genres"]].reset_index(drop=True),
        users,
    )
