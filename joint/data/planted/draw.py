"""Drawing a world: users and items in clusters, their tastes, and the features a log would know of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from joint.data.planted.truth import AGES, GENDERS, TASTES, Parameters, Truth, clustered, exact, zipf_choice
from joint.data.requests import Column
from joint.schema import Feature, day_number, first_day_column

START = day_number("2024-01-13")  # RecFlow's first day
PROVINCES = 30
LENGTHS = 8  # buckets of `duration`
SERIES, MOVIE, CLIP = 1, 2, 3  # ids of `upload_type`


@dataclass(frozen=True)
class World:
    """The truth, and what a log says of users and items: one value (id 1 and up) for each of them."""

    truth: Truth
    users: Mapping[str, np.ndarray]
    catalogue: Mapping[str, Column]
    features: tuple[Feature, ...]


def draw_world(p: Parameters, seed: int) -> World:
    """The world of these parameters and this seed."""
    rng = np.random.default_rng([seed, 0])
    users, tastes_of_users, cluster = _users(p, rng)
    items, catalogue, parents = _items(p, rng)
    # The view's vectors carry its deviation on the items' side, as all tastes do; 'view_later' is a quarter turn away.
    scales = (p.view_taste, p.like_taste, p.minutes_taste, p.returns_taste)
    tastes_of_items = {
        f"item.{task}": exact(scale / np.sqrt(p.dims) * clustered(rng, parents, p.own_style, p.dims))
        for task, scale in zip(TASTES, scales, strict=True)
    }
    effects = exact(p.attribute * rng.standard_normal((AGES * GENDERS, p.categories)))
    truth = Truth(
        p, START, {**tastes_of_users, **items, **tastes_of_items, "effects": effects, "user.cluster": cluster}
    )
    sizes = {
        "user_id": p.users,
        "age": AGES,
        "gender": GENDERS,
        "province": PROVINCES,
        "device_id": p.users,
        "video_id": p.items,
        "author_id": p.authors,
        "category_level_one": p.categories,
        "category_level_two": p.categories * p.subcategories,
        "upload_type": CLIP,
        "duration": LENGTHS,
    }
    features = tuple(
        Feature(name=name, level="request" if name in users else "item", kind="id", size=size + 1)
        for name, size in sizes.items()
    )
    return World(truth, users, catalogue, features)


def _users(p: Parameters, rng: np.random.Generator) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], np.ndarray]:
    """The features of users, their part of the truth, and their clusters."""
    cluster = rng.integers(p.user_clusters, size=p.users)
    age = (cluster + rng.integers(3, size=p.users)) % AGES  # a cluster has three neighbouring ages
    gender = rng.integers(GENDERS, size=p.users)
    features: dict[str, np.ndarray] = {
        "user_id": np.arange(p.users) + 1,
        "age": (age + 1).astype(np.int8),
        "gender": (gender + 1).astype(np.int8),
        "province": (zipf_choice(rng, PROVINCES, p.users) + 1).astype(np.int8),
        "device_id": rng.permutation(p.users) + 1,
    }
    tastes = {f"user.{task}": exact(clustered(rng, [cluster], p.own_taste, p.dims)) for task in (*TASTES, "view_later")}
    return features, {**tastes, "user.cell": age * GENDERS + gender}, cluster


def _items(
    p: Parameters, rng: np.random.Generator
) -> tuple[dict[str, np.ndarray], dict[str, Column], list[np.ndarray]]:
    """The items' part of the truth, the catalogue, and what items' vectors are clustered by."""
    home = zipf_choice(rng, p.categories, p.authors)  # the category of an author
    author = zipf_choice(rng, p.authors, p.items)
    category = home[author]
    subcategory = category * p.subcategories + rng.integers(p.subcategories, size=p.items)
    kind = rng.integers(SERIES, CLIP + 1, size=p.items)
    length = 2 * np.exp(0.7 * rng.standard_normal(p.items))  # minutes
    later = rng.permutation(p.items) < p.later_items
    first_day = (START + np.where(later, rng.integers(1, p.days, size=p.items), 0)).astype(np.int32)
    catalogue: dict[str, Column] = {
        "video_id": np.arange(p.items) + 1,
        "author_id": author + 1,
        "category_level_one": category + 1,
        "category_level_two": subcategory + 1,
        "upload_type": kind.astype(np.int8),
        "duration": _octiles(length),
        "length_minutes": length,
        first_day_column(""): first_day,
    }
    truth = {
        "item.appeal": p.appeal * rng.standard_exponential(p.items),
        "item.author": author,
        "item.category": category,
        "item.subcategory": subcategory,
        "item.series": (kind == SERIES).astype(np.float64),
        "item.length": length,
        "item.first_day": first_day,
    }
    return truth, catalogue, [category, subcategory, author]


def _octiles(values: np.ndarray) -> np.ndarray:
    """Ids 1 .. LENGTHS of equally many values each, by size."""
    rank = np.argsort(np.argsort(values, kind="stable"), kind="stable")
    return (rank * LENGTHS // len(values) + 1).astype(np.int8)
