"""A little MovieLens, made up here and written in every layout; prepared once, with a config for it."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from joint.data.dataset import Dataset
from joint.data.movielens import prepare_movielens

RUN = 4  # ratings a training request of the prepared dataset
GENRES = ["Action", "Comedy", "Drama", "Film-Noir", "Sci-Fi"]
CONFIG = """
run: {{name: tiny, dir: {runs}}}
data:
  path: {dataset}
  epochs: 2
  requests_per_batch: 32
  candidates: {{exposed: all, random: 4}}
  not_eligible: [rated]
tasks:
  watch: {{label: rating, at_least: 0.5}}
  like: {{label: rating, at_least: 4}}
tables:
  user_id: {{dim: 8}}
  age: {{dim: 8}}
  item_id: {{dim: 8}}
  year: {{dim: 4}}
  genres: {{dim: 8}}
  rating: {{dim: 8}}
encoders:
  liked: {{history: liked, features: [item_id], length: 6, by: {{kind: mean}}}}
  rated: {{history: rated, features: [item_id, genres], events: [rating], length: 5,
          by: {{kind: target_attention, hidden: [8]}}}}
heads:
  retrieval: {{features: [user_id, age, liked, item_id, year, genres], dim: 8,
              trunk: {{kind: mmoe, experts: 2, hidden: [8]}}}}
  pre_ranking: {{features: [user_id, liked, item_id, genres], dim: 8, trunk: {{kind: snr, hidden: [8]}}}}
  ranking: {{features: [user_id, age, liked, rated, item_id, year, genres], trunk: {{kind: snr, hidden: [8]}}}}
objectives:
  teacher: {{head: ranking, loss: binary, space: [exposed, random]}}
  student: {{head: pre_ranking, loss: binary, space: [exposed]}}
  distill: {{head: pre_ranking, loss: distillation, space: [exposed, random], teacher: ranking}}
  negatives: {{head: pre_ranking, loss: adaptive_contrastive, space: [random], tasks: [like]}}
  retrieve: {{head: retrieval, loss: multi_class, space: [corpus]}}
evaluation: {{task: like, k: [5, 20], quotas: {{retrieval: 20, pre_ranking: 10, ranking: 5}}}}
"""


@dataclass
class Log:
    """What the made-up release holds, before it has a layout. Rows may be changed, to see what becomes of it."""

    ratings: list[tuple[object, ...]]  # user, item, rating, timestamp
    items: list[tuple[int, str, str, list[str]]]  # item, title, year or '', genres
    users: list[tuple[int, int, str, str, str]]  # user, age, gender, occupation, zip code


def make_log() -> Log:
    """40 users, 60 items. Ids have gaps and no order, most ratings share their time with others of the user."""
    rng = np.random.default_rng(0)
    item_ids = (rng.permutation(90)[:60] + 7).tolist()
    odd_titles = ['"Quoted" Movie', 'One " Quote', "Café, Le", "None", "NA", "L'Été", "Semi; Colon: Two", ""]
    items = []
    for place, item in enumerate(item_ids):
        title = odd_titles[place] if place < len(odd_titles) else f"Movie {item}"
        genres = [genre for genre in GENRES if rng.random() < 0.3]
        items.append((item, title, "" if place % 9 == 4 else str(1980 + place % 12), genres))
    users = [
        (user, int(rng.integers(7, 74)), "MF"[user % 2], ["none", "artist", "other"][user % 3], f"{user:05}"[::-1])
        for user in (rng.permutation(60)[:40] + 3).tolist()
    ]
    users[5] = (*users[5][:4], "T8H1N")  # a Canadian zip code
    ratings: list[tuple[object, ...]] = []
    for place, user in enumerate(users):
        count = 1 + place % 12 * 4 if place else 50
        times = 880_000_000 + rng.integers(0, 50) * 86_400 + rng.integers(0, count // 3 + 1, count) * 60
        highest = 4 if place in (3, 17) else 6  # two users like nothing
        for item, time in zip(rng.permutation(item_ids)[:count].tolist(), times.tolist(), strict=True):
            ratings.append((user[0], item, int(rng.integers(1, highest)), time))
    return Log(
        [ratings[place] for place in rng.permutation(len(ratings))], items, users[:-1]
    )  # the last user has rated, but is not described


def _write(path: Path, rows: Sequence[Sequence[object]], separator: str, *, header: str = "", encoding: str) -> None:
    lines = [separator.join(str(value) for value in row) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(f"{line}\n" for line in [*([header] if header else []), *lines]).encode(encoding))


def _titled(title: str, year: str) -> str:
    return f"{title} ({year})" if year else title


def write_grouplens(log: Log, folder: Path) -> None:
    """ML-100K as GroupLens has it: tabs and pipes, latin-1, a flag for each genre."""
    _write(folder / "u.data", log.ratings, "\t", encoding="latin-1")
    _write(folder / "u.genre", [(genre, number) for number, genre in enumerate(GENRES)], "|", encoding="latin-1")
    _write(folder / "u.user", log.users, "|", encoding="latin-1")
    items = [
        (item, _titled(title, year), "01-Jan-1995", "", "http://x/?a=1", *(int(genre in genres) for genre in GENRES))
        for item, title, year, genres in log.items
    ]
    _write(folder / "u.item", items, "|", encoding="latin-1")


def write_recbole(log: Log, folder: Path) -> None:
    """ML-100K as RecBole has it: tabs, UTF-8, types in the header."""
    folder = folder / "dataset_example" / "ml-100k"
    items = [(item, title, year, " ".join(genres)) for item, title, year, genres in log.items]
    for name, rows, header in (
        ("inter", log.ratings, "user_id:token item_id:token rating:float timestamp:float"),
        ("item", items, "item_id:token movie_title:token_seq release_year:token class:token_seq"),
        ("user", log.users, "user_id:token age:token gender:token occupation:token zip_code:token"),
    ):
        _write(folder / f"ml-100k.{name}", rows, "\t", header=header.replace(" ", "\t"), encoding="utf-8")


def write_one_million(log: Log, folder: Path) -> None:
    """ML-1M: '::' everywhere, latin-1."""
    items = [(item, _titled(title, year), "|".join(genres)) for item, title, year, genres in log.items]
    users = [(user, gender, age, occupation, zip_code) for user, age, gender, occupation, zip_code in log.users]
    for name, rows in (("ratings", log.ratings), ("movies", items), ("users", users)):
        _write(folder / "ml-1m" / f"{name}.dat", rows, "::", encoding="latin-1")


def write_csv(log: Log, folder: Path) -> None:
    """ML-20M and later: CSV with a header and quotes, UTF-8, no users."""
    items = []
    for item, title, year, genres in log.items:
        quoted = _titled(title, year).replace('"', '""')
        items.append((item, f'"{quoted}"', "|".join(genres) or "(no genres listed)"))
    _write(folder / "ratings.csv", log.ratings, ",", header="userId,movieId,rating,timestamp", encoding="utf-8")
    _write(folder / "movies.csv", items, ",", header="movieId,title,genres", encoding="utf-8")


@pytest.fixture
def log() -> Log:
    """The made-up ratings, fresh for every test."""
    return make_log()


@pytest.fixture(scope="session")
def layouts() -> dict[str, Callable[[Log, Path], None]]:
    """Layout -> a function that writes a log in it."""
    return {
        "grouplens": write_grouplens,
        "recbole": write_recbole,
        "one_million": write_one_million,
        "csv": write_csv,
    }


@pytest.fixture(scope="session")
def dataset_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The little MovieLens prepared, RUN ratings a request. Do not change it: copy it."""
    folder = tmp_path_factory.mktemp("movielens")
    write_grouplens(make_log(), folder / "raw")
    prepare_movielens(folder / "raw", folder / "dataset", run=RUN, seed=0, overwrite=False)
    return folder / "dataset"


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The made-up ratings where RecBole's wheel has ML-100K."""
    folder = tmp_path_factory.mktemp("wheel")
    write_recbole(make_log(), folder / "recbole")
    return Path(shutil.make_archive(str(folder / "recbole"), "zip", folder / "recbole")).rename(folder / "recbole.whl")


@pytest.fixture(scope="session")
def dataset(dataset_path: Path) -> Dataset:
    """The same, opened."""
    return Dataset(dataset_path)


@pytest.fixture
def config_path(dataset_path: Path, tmp_path: Path) -> Path:
    """A config of three heads over that dataset, in a folder of its own, where its runs go too (`runs/tiny`)."""
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG.format(dataset=dataset_path, runs=tmp_path / "runs"))
    return path
