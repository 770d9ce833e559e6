"""MovieLens as GroupLens and RecBole lay it out: found in a directory, zip or wheel, read, and checked."""

from __future__ import annotations

import csv
import io
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd

from joint.errors import DataError

RATINGS = ("user", "item", "rating", "timestamp")
USERS = ("user", "age", "gender", "occupation", "zip_code")
HEADERS = {
    "user_id": "user",
    "userId": "user",
    "item_id": "item",
    "movieId": "item",
    "movie_title": "title",
    "release_year": "year",
    "class": "genres",
}
NUMBERS = {"user": (0, 2**53), "item": (0, 2**53), "rating": (0.5, 5), "timestamp": (0, 2**32), "age": (0, 150)}
AGES = {0: "0-17", 18: "18-24", 25: "25-34", 35: "35-44", 45: "45-49", 50: "50-55", 56: "56+"}  # ML-1M's groups


@dataclass(frozen=True)
class Tables:
    """One MovieLens release; what is not known is missing (NaN) or an empty list."""

    ratings: pd.DataFrame  # user, item, rating, timestamp; each (user, item) once
    items: pd.DataFrame  # item, title, year, genres (a list); each item once
    users: pd.DataFrame | None  # user, age (group), gender, occupation, zip_code (first sign); each user once


def read_tables(source: Path) -> Tables:
    """Find and read the one MovieLens release inside a directory, a zip or a wheel.

    Raises:
        DataError: not exactly one release is inside, a file is missing or unreadable, or a value is not what its
            column should hold.
    """
    files = _files(source)
    found = [name for name in files if PurePosixPath(name).name in _LAYOUTS]
    if not found:
        raise DataError(f"{source}: no MovieLens found; expected one of {', '.join(_LAYOUTS)} in it, at any depth")
    if len(found) > 1:
        raise DataError(f"{source}: holds several releases ({', '.join(found[:3])}); expected one")
    ratings = PurePosixPath(found[0])
    tables = _LAYOUTS[ratings.name](_Release(source, ratings.parent, files))
    if tables.ratings.empty:
        raise DataError(f"{source}/{ratings}: no rating; expected at least one")
    lost = ~tables.ratings.item.isin(tables.items.item)
    if lost.any():
        row = int(lost.to_numpy().argmax())
        raise DataError(f"{source}/{ratings}: row {row + 1}: the catalogue has no item {tables.ratings.item[row]}")
    return tables


def _files(source: Path) -> dict[str, Callable[[], bytes]]:
    """Path inside the source -> a function that reads the file."""
    if source.is_dir():
        return {p.relative_to(source).as_posix(): p.read_bytes for p in sorted(source.rglob("*")) if p.is_file()}
    if not source.is_file():
        raise DataError(f"{source}: not found; expected a MovieLens directory, zip or wheel")
    try:
        archive = zipfile.ZipFile(source)
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{source}: neither a directory nor a whole zip archive ({error})") from error

    def reader(name: str) -> Callable[[], bytes]:
        return lambda: archive.read(name)

    return {name: reader(name) for name in archive.namelist()}


@dataclass(frozen=True)
class _Release:
    """The files of one release, which lie side by side in a folder of the source."""

    source: Path
    folder: PurePosixPath
    files: Mapping[str, Callable[[], bytes]]

    def table(
        self,
        name: str,
        columns: Sequence[str],
        *,
        separator: str = "\t",
        header: bool = False,
        quoting: int = csv.QUOTE_NONE,
        encoding: str = "latin-1",
    ) -> pd.DataFrame:
        """The named columns of a file, checked: numbers where NUMBERS says so, each user or item (or pair) once."""
        path = str(self.folder / name)
        where = f"{self.source}/{path}"
        content = self._read(path, where)
        if separator == "::":  # pandas' fast parser splits at a single character
            content, separator = content.replace(b"::", b"\t"), "\t"
        try:
            table = pd.read_csv(
                io.BytesIO(content),
                sep=separator,
                header=0 if header else None,
                # Zip codes and years are text; ratings, of which there may be many, are left to the parser.
                dtype=None if tuple(columns) == RATINGS else str,
                keep_default_na=False,  # a movie may be called 'None'
                na_values=[""],
                low_memory=False,
                quoting=quoting,
                encoding=encoding,
            )
        except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
            reason = str(error).strip()
            raise DataError(f"{where}: not a table of {', '.join(columns)} ({reason})") from error
        table = _named(where, table, columns, header)
        for column in (name for name in columns if name in NUMBERS):
            table[column] = _numbers(where, table[column])
        _check_keys(where, table)
        return table

    def _read(self, path: str, where: str) -> bytes:
        if path not in self.files:
            raise DataError(f"{where}: not found; a file of this release is missing")
        try:
            return self.files[path]()
        # An encrypted member is a RuntimeError, an unknown compression a NotImplementedError.
        except (OSError, EOFError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
            raise DataError(f"{where}: cannot be read ({error})") from error


def _named(where: str, table: pd.DataFrame, columns: Sequence[str], header: bool) -> pd.DataFrame:
    """The table's columns under our names."""
    if not header:
        if table.shape[1] != len(columns):
            raise DataError(f"{where}: {table.shape[1]} columns; expected {len(columns)}: {', '.join(columns)}")
        return table.set_axis(list(columns), axis=1)
    if not isinstance(table.index, pd.RangeIndex):  # what pandas makes of further values
        raise DataError(f"{where}: rows hold more values than the header has columns ({', '.join(table.columns)})")
    words = [str(word).split(":")[0].strip() for word in table.columns]  # RecBole writes NAME:TYPE
    named = table.set_axis([HEADERS.get(word, word) for word in words], axis=1)
    missing = [column for column in columns if list(named.columns).count(column) != 1]
    if missing:
        raise DataError(f"{where}: no column {', '.join(missing)}; found: {', '.join(words)}")
    return named[list(columns)]


def _numbers(where: str, column: pd.Series) -> pd.Series:
    low, high = NUMBERS[str(column.name)]
    whole = column.name != "rating"
    numbers = pd.to_numeric(column, errors="coerce")
    wrong = ~numbers.between(low, high)
    if whole:
        wrong |= numbers % 1 != 0
    if wrong.any():
        row = int(wrong.to_numpy().argmax())
        expected = f"{'a whole' if whole else 'a'} number from {low} to {high}"
        raise DataError(f"{where}: row {row + 1}: {column.name} is '{column.iloc[row]}'; expected {expected}")
    return numbers.astype("int64" if whole else "float32")


def _check_keys(where: str, table: pd.DataFrame) -> None:
    keys = [name for name in ("user", "item") if name in table]
    twice = table.duplicated(keys).to_numpy() if keys else np.zeros(1, bool)
    if twice.any():
        row = int(twice.argmax())
        found = ", ".join(f"{key} {table[key].iloc[row]}" for key in keys)
        raise DataError(f"{where}: row {row + 1}: {found} a second time; expected once")


def _recbole(release: _Release) -> Tables:
    items = release.table("ml-100k.item", ("item", "title", "year", "genres"), header=True, encoding="utf-8")
    users = release.table("ml-100k.user", USERS, header=True, encoding="utf-8")
    year = items.year.str.extract(r"^(\d{4})$")[0]  # of two movies there is none: 'unknown' and 'V', video
    items = items.assign(title=items.title.fillna(""), year=year, genres=_lists(items.genres, " "))
    ratings = release.table("ml-100k.inter", RATINGS, header=True, encoding="utf-8")
    return Tables(ratings, items, _grouped(users))


def _grouplens_100k(release: _Release) -> Tables:
    genres = release.table("u.genre", ("genre", "number"), separator="|").genre.to_numpy()
    raw = release.table("u.item", ("item", "title", "date", "video_date", "url", *genres), separator="|")
    chosen = (raw[genres] == "1").to_numpy()
    items = _titled(raw).assign(genres=pd.Series([list(genres[row]) for row in chosen], dtype=object))
    return Tables(release.table("u.data", RATINGS), items, _grouped(release.table("u.user", USERS, separator="|")))


def _one_million(release: _Release) -> Tables:
    raw = release.table("movies.dat", ("item", "title", "genres"), separator="::")
    users = release.table("users.dat", ("user", "gender", "age", "occupation", "zip_code"), separator="::")
    items = _titled(raw).assign(genres=_lists(raw.genres, "|"))
    return Tables(release.table("ratings.dat", RATINGS, separator="::"), items, _grouped(users))


def _csv(release: _Release) -> Tables:
    def read(name: str, columns: Sequence[str]) -> pd.DataFrame:
        return release.table(name, columns, separator=",", header=True, quoting=csv.QUOTE_MINIMAL, encoding="utf-8")

    raw = read("movies.csv", ("item", "title", "genres"))
    return Tables(read("ratings.csv", RATINGS), _titled(raw).assign(genres=_lists(raw.genres, "|")), None)


# The ratings file by which a layout is known.
_LAYOUTS: dict[str, Callable[[_Release], Tables]] = {
    "ml-100k.inter": _recbole,
    "u.data": _grouplens_100k,
    "ratings.dat": _one_million,
    "ratings.csv": _csv,
}


def _titled(items: pd.DataFrame) -> pd.DataFrame:
    """The item, and its title split into title and year: 'Toy Story (1995)'."""
    parts = items.title.fillna("").str.extract(r"(?s)^(.*?)\s*(?:\((\d{4})\)\s*)?$")
    return pd.DataFrame({"item": items.item, "title": parts[0], "year": parts[1]})


def _lists(cells: pd.Series, separator: str) -> pd.Series:
    none = ("", "(no genres listed)")
    lists = [[word for word in cell.split(separator) if word not in none] for cell in cells.fillna("")]
    return pd.Series(lists, dtype=object)


def _grouped(users: pd.DataFrame) -> pd.DataFrame:
    """Ages in seven groups, zip codes by their first sign; the columns in the order of USERS."""
    age = pd.cut(users.age, [*AGES, np.inf], labels=list(AGES.values()), right=False)
    return users.assign(age=age, zip_code=users.zip_code.str[:1])[list(USERS)]
