"""What the planted worlds are like, and what there is to learn in them: the tables and pictures of docs/simulate.md.

    python -m benchmarks.worlds FOLDER

FOLDER keeps the simulated datasets; those in it are used again. Needs matplotlib. About ten minutes on one core.

The small model here is no stage of the trainer: two sums of embeddings and their product, trained by a softmax of
winners against losers of their request and random items. It shows what can be learned from which winners and losers.
DWM counts as known at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.worlds_pictures import draw_all
from joint import metrics
from joint.data.dataset import Dataset
from joint.data.planted.simulate import WORLDS, parameters_of, simulate
from joint.data.planted.truth import LIST, Truth, group_counts, open_truth, top
from joint.data.ragged import Ragged
from joint.data.requests import Requests
from joint.schema import Stage

SEEDS = range(4)
DIM, BATCH, EPOCHS, RANDOM = 16, 256, 2, 200
USER, ITEM = ("user_id", "age", "gender"), ("video_id", "author_id", "category_level_one", "category_level_two")
LESSONS = ("feedback", "feedback, cross features", "random negatives", "stage negatives", "imitation")
GROUPS = ("random", "prerank_neg", "coarse_neg", "ranked", "exposed_neg")


@dataclass(frozen=True)
class Planted:
    """A simulated dataset with what the measurements need of it."""

    dataset: Dataset
    truth: Truth
    train: Requests
    test: Requests


def planted(folder: Path, world: str, seed: int) -> Planted:
    """The report size of a world, simulated unless it is there."""
    path = folder / f"{world}-{seed}"
    if not path.exists():
        simulate(path, parameters_of(world, "report"), seed=seed, world=world)
    dataset, truth = Dataset(path), open_truth(path)
    assert truth
    return Planted(dataset, truth, dataset.read_split("train"), dataset.read_split("test"))


class TwoTowers(nn.Module):
    """Sums of embeddings of a user's features and last views, and of an item's; optionally the cross features."""

    def __init__(self, world: Planted, *, crossed: bool) -> None:
        super().__init__()
        sizes = {feature.name: feature.size for feature in world.dataset.schema.features}
        self.columns = [torch.from_numpy(np.asarray(world.dataset.catalogue[name]).astype(np.int64)) for name in ITEM]
        self.user = nn.ModuleList(nn.Embedding(sizes[name], DIM) for name in USER)
        self.item = nn.ModuleList(nn.Embedding(sizes[name], DIM) for name in ITEM)
        self.past = nn.EmbeddingBag(sizes["video_id"], DIM, mode="mean")
        self.bias = nn.Embedding(sizes["video_id"], 1)
        self.counts = nn.ModuleList(nn.Embedding(world.truth.parameters.window + 1, 1) for _ in range(2))
        for weight in self.parameters():
            nn.init.normal_(weight, std=0.1)
        for table in (self.bias, *self.counts):
            nn.init.zeros_(table.weight)
        self.truth, self.crossed = world.truth, crossed

    def users(self, requests: Requests) -> Tensor:
        """[R, DIM]."""
        ids = [torch.from_numpy(requests.scalars(name).astype(np.int64)) for name in USER]
        past = requests.lists("effective").newest(self.truth.parameters.window)
        views = self.past(torch.from_numpy(past.values.astype(np.int64)) + 1, torch.from_numpy(past.offsets[:-1]))
        return sum((table(column) for table, column in zip(self.user, ids, strict=True)), views)

    def items(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """[N, DIM] and biases [N]."""
        rows = [table(column[items]) for table, column in zip(self.item, self.columns, strict=True)]
        return torch.stack(rows).sum(0), self.bias(self.columns[0][items]).squeeze(1)

    def cross(self, requests: Requests, rows: Tensor, items: Tensor) -> Tensor:
        """What past views of items' authors and categories add, for pairs whose indices broadcast; or nothing."""
        total = torch.zeros(())
        if self.crossed:
            p, arrays = self.truth.parameters, self.truth.arrays
            past = requests.lists("effective").newest(p.window)
            groups = (("item.author", p.authors), ("item.subcategory", p.categories * p.subcategories))
            for table, (name, count) in zip(self.counts, groups, strict=True):
                counts = torch.from_numpy(group_counts(past, arrays[name], count))
                total = total + table(counts[rows, torch.from_numpy(arrays[name])[items]]).squeeze(-1)
        return total

    def all_pairs(self, requests: Requests, user: Tensor, items: Tensor) -> Tensor:
        """Scores of every request with each of `items` [M]: [R, M]."""
        vectors, bias = self.items(items)
        return user @ vectors.T + bias + self.cross(requests, torch.arange(len(user))[:, None], items[None, :])

    def forward(self, requests: Requests) -> Tensor:
        """Scores of every item [R, items]."""
        return self.all_pairs(requests, self.users(requests), torch.arange(len(self.columns[0])))


def sides(world: Planted, lesson: str, requests: Requests) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which candidates win, with which weight, and which lose. What feedback won weighs as much as it was worth."""
    p = world.truth.parameters
    exposed = (requests.lists("stages").values & int(Stage.EXPOSED)) != 0
    viewed, like, dwm = (np.nan_to_num(requests.lists(name).values) for name in ("effective_view", "like", "dwm"))
    if lesson == "imitation":
        return exposed, np.ones(len(exposed), np.float32), ~exposed
    reward = viewed + p.like_reward * like + p.minute_reward * dwm
    return viewed > 0, reward, viewed == 0 if lesson.endswith("negatives") else exposed & (viewed == 0)


def learn(world: Planted, lesson: str) -> TwoTowers:
    """A model that has learned one lesson from the training days."""
    torch.manual_seed(0)
    model = TwoTowers(world, crossed="cross" in lesson)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    rng = np.random.default_rng(0)
    for start in [*range(0, len(world.train), BATCH)] * EPOCHS:
        requests = world.train.take(np.arange(start, min(start + BATCH, len(world.train))))
        loss = softmax_loss(model, world, requests, lesson, rng)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def softmax_loss(model: TwoTowers, world: Planted, requests: Requests, lesson: str, rng: np.random.Generator) -> Tensor:
    """Weighted mean over winners of -log softmax among itself, its request's losers and random items."""
    out = np.flatnonzero(world.dataset.first_day[""] <= requests.scalars("day")[0])
    winner, weight, loser = sides(world, lesson, requests)
    kept = winner | loser
    candidates = requests.lists("candidates")
    row, item = (torch.from_numpy(v[kept].astype(np.int64)) for v in (candidates.rows, candidates.values))
    if lesson == "random negatives":  # the placebo: as many losers, drawn instead of cut
        shown = torch.from_numpy((requests.lists("stages").values[kept] & int(Stage.EXPOSED)) != 0)
        item = item.where(shown, torch.from_numpy(rng.choice(out, len(item))))
    win, lose, weights = (torch.from_numpy(v[kept]) for v in (winner, loser, weight))
    user = model.users(requests)
    vectors, bias = model.items(item)
    scores = (user[row] * vectors).sum(1) + bias + model.cross(requests, row, item)
    random = model.all_pairs(requests, user, torch.from_numpy(rng.choice(out, RANDOM))).exp().sum(1)
    others = random.index_add(0, row, scores.exp() * lose)
    losses = torch.logaddexp(scores, others.log()[row]) - scores
    return (weights * losses)[win].sum() / weights[win].sum()


@torch.no_grad()
def true_reward(model: TwoTowers, world: Planted) -> float:
    """Mean true reward per item of the ten that the model would serve to the test requests."""
    lists = []
    for start in range(0, len(world.test), BATCH):
        requests = world.test.take(np.arange(start, min(start + BATCH, len(world.test))))
        lists.append(top(np.where(world.truth.free(requests), model(requests).numpy(), -np.inf), LIST))
    served = np.concatenate(lists)
    return float(world.truth.reward(world.test, Ragged(served.ravel(), np.arange(len(served) + 1) * LIST)).mean())


def tails(world: Planted) -> dict[str, np.ndarray]:
    """Views per item and requests per user on training days, largest first."""
    viewed = np.nan_to_num(world.train.lists("effective_view").values)
    views = np.bincount(world.train.lists("candidates").values, viewed, world.dataset.schema.items)
    requests = np.bincount(world.train.scalars("user_id") - 1, minlength=world.truth.parameters.users)
    return {"views of an item": np.sort(views)[::-1], "requests of a user": np.sort(requests)[::-1]}


def hardness(world: Planted) -> dict[str, tuple[float, float]]:
    """Group -> AUC of the true reward of viewed exposures against it, and its mean reward; on the test day."""
    stages = world.test.lists("stages").values
    exposed = (stages & int(Stage.EXPOSED)) != 0
    viewed = np.nan_to_num(world.test.lists("effective_view").values) > 0
    reward = world.truth.reward(world.test, world.test.lists("candidates"))
    drawn = np.concatenate(list(some_free(world)))
    random = world.truth.reward(world.test, Ragged(drawn, np.arange(len(drawn) + 1)))
    ranked = ((stages & int(Stage.RANKED)) != 0) & ~exposed
    masks = [(stages & int(stage)) != 0 for stage in (Stage.PRERANK_NEG, Stage.COARSE_NEG)]
    groups = [random, *(reward[mask] for mask in masks), reward[ranked], reward[exposed & ~viewed]]
    found = {}
    for name, group in zip(GROUPS, groups, strict=True):
        both = torch.from_numpy(np.concatenate([reward[viewed], group]))
        found[name] = metrics.auc(both, torch.arange(len(both)) < viewed.sum()).value, float(group.mean())
    return found


def some_free(world: Planted) -> Iterator[np.ndarray]:
    """One item that could be shown for every test request."""
    rng = np.random.default_rng(0)
    for start in range(0, len(world.test), BATCH):
        free = world.truth.free(world.test.take(np.arange(start, min(start + BATCH, len(world.test)))))
        yield (free * rng.random(free.shape)).argmax(axis=1)


def disagreement(world: Planted) -> tuple[list[str], np.ndarray]:
    """Kendall's tau of the orders that the true tasks give what was retrieved for a test request."""
    candidates = world.test.lists("candidates")
    expected = world.truth.expected(world.test, candidates)
    orders = {
        "view": expected["effective_view"],
        "like, if viewed": expected["like"] / expected["effective_view"],
        "minutes, if viewed": expected["minutes"] / expected["effective_view"],
        "minutes": expected["minutes"],
        "DWM": expected["dwm"],
        "reward": expected["reward"],
    }
    columns = [torch.from_numpy(values) for values in orders.values()]
    offsets = torch.from_numpy(candidates.offsets)
    taus = [[1 - 2 * metrics.kendall_distance(a, b, offsets).value for b in columns] for a in columns]
    return list(orders), np.array(taus)


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown; numbers to three places."""
    lines: list[Sequence[object]] = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in line) + " |"
        for line in lines
    )


def main() -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(prog="benchmarks.worlds", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pictures", type=Path, default=Path("docs/pictures"))
    arguments = parser.parse_args()
    bounds = ("random", "popularity", "incumbent", "light_oracle", "oracle")
    values: dict[str, dict[str, list[float]]] = {world: {} for world in WORLDS}
    hard: dict[str, dict[str, list[tuple[float, float]]]] = {world: {group: [] for group in GROUPS} for world in WORLDS}
    for world in WORLDS:
        for seed in SEEDS:
            log = planted(arguments.folder, world, seed)
            found = {name: log.truth.ceilings[f"test/{name}"] for name in bounds}
            found |= {lesson: true_reward(learn(log, lesson), log) for lesson in LESSONS}
            for name, value in found.items():
                values[world].setdefault(name, []).append(value)
            for group, pair in hardness(log).items():
                hard[world][group].append(pair)
            print(world, seed, {name: round(value, 3) for name, value in found.items()}, flush=True)
    names = [*bounds, *LESSONS]
    print(table(["world", *names], [[w, *(float(np.mean(values[w][n])) for n in names)] for w in WORLDS]))
    means = {world: {group: np.mean(pairs, axis=0) for group, pairs in hard[world].items()} for world in WORLDS}
    rows = [[w, *(f"{means[w][group][0]:.3f} ({means[w][group][1]:.2f})" for group in GROUPS)] for w in WORLDS]
    print(table(["world", *GROUPS], rows))
    log = planted(arguments.folder, "biased", 0)
    tasks, taus = disagreement(log)
    print(table(["Kendall's tau", *tasks], [[task, *map(float, row)] for task, row in zip(tasks, taus, strict=True)]))
    draw_all(arguments.pictures, tails(log), hard, values, (tasks, taus))


if __name__ == "__main__":
    main()
