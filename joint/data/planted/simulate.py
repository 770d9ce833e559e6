"""A planted funnel -> a dataset: an incumbent serves users whose wishes are known, and its log is written down.

    python -m joint.prepare simulate OUT [KEY=VALUE ...] --world biased --seed 0 --size report

Requests are served in time order as far as it matters: the n-th requests that users make on a day are served
together, so that each sees all that its user did before. What comes of it is drawn from the truth (`truth.py`), on
exposures only. Training days log what RecFlow does: all that entered re-ranking, and a sample of what each earlier
stage cut. The last two days, validation and test, log all that was retrieved. The truth is kept in OUT/truth.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from joint.configuring.settings import Tree, decode
from joint.configuring.sources import Place
from joint.data.dataset import DatasetWriter
from joint.data.planted.draw import START, World, draw_world
from joint.data.planted.incumbent import Incumbent, Logged
from joint.data.planted.people import WATCHED, Feedback, Memory, draw_visits, histories, login_groups
from joint.data.planted.truth import BLOCK, LABELS, LIST, Chances, Parameters, Truth, blocks, top
from joint.data.ragged import Ragged, offsets_of
from joint.data.requests import Column, Requests, concatenate_requests
from joint.errors import ConfigError
from joint.progress import progress
from joint.schema import Feature, Schema, Stage, day_name

WORLDS = {"fair": 0.0, "biased": 0.4, "misled": 0.8}  # name -> `systematic`
SIZES: dict[str, dict[str, int]] = {
    "small": {},
    "report": {
        "users": 3000,
        "items": 4000,
        "days": 20,
        "requests": 30_000,
        "retrieved": 300,
        "coarse": 150,
        "ranked": 60,
    },
}
FLAGS = ("users", "items", "days", "requests", "exposed")
MATURES = 8.0  # days until DWM is known: the request's own and seven more


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `joint.prepare simulate`."""
    parser.add_argument("out", type=Path, help="folder of the dataset, made by this command")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="any parameter of docs/simulate.md")
    parser.add_argument("--world", choices=WORLDS, default="biased", help="how wrong the incumbent's taste is")
    parser.add_argument("--seed", type=int, default=0, help="which draw of that world (default 0)")
    parser.add_argument("--size", choices=SIZES, default="small", help="of users, items, requests (default small)")
    for name in FLAGS:
        parser.add_argument(f"--{name}", metavar="N", help=f"the same as {name}=N")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")


def prepare(arguments: argparse.Namespace) -> Schema:
    """Simulate as `add_arguments` says; ConfigError for parameters that make no sense."""
    if arguments.seed < 0:
        raise ConfigError(f"--seed is {arguments.seed}; expected 0 or more")
    flags = [f"{name}={getattr(arguments, name)}" for name in FLAGS if getattr(arguments, name) is not None]
    parameters = parameters_of(arguments.world, arguments.size, [*flags, *arguments.overrides])
    named = parameters.systematic == WORLDS[arguments.world]
    world = arguments.world if named else ""
    return simulate(arguments.out, parameters, seed=arguments.seed, world=world, overwrite=arguments.overwrite)


def parameters_of(world: str, size: str, overrides: Sequence[str] = ()) -> Parameters:
    """The parameters of a named world and size, with `key=value` overrides; ConfigError with a line per mistake."""
    start = Place(0, 0, f"--world {world} --size {size}")
    named = SIZES[size] | {"systematic": WORLDS[world]}
    tree = {name: Tree(str(value), start, str(value)) for name, value in named.items()}
    for number, text in enumerate(overrides):
        name, _, value = text.partition("=")
        tree[name] = Tree(value, Place(1, number, f"{text} (command line)"), value)
    return decode(Tree(tree, start), Parameters)


def simulate(
    out: Path, parameters: Parameters, *, seed: int, world: str = "", overwrite: bool = False, chunk: int = BLOCK
) -> Schema:
    """Write the log of a world and its truth to OUT. The same parameters and seed give the same bytes.

    Args:
        world: its name, for the record.
        chunk: requests served at a time; it changes nothing but memory and speed.
    """
    p = parameters
    writer = DatasetWriter(out, overwrite=overwrite)
    simulation = Simulation(p, seed, chunk)
    views = np.zeros(p.items)
    ceilings: dict[str, float] = {}
    with writer:
        writer.items(simulation.world.catalogue)
        for day in progress(range(p.days), "simulating", unit="day"):
            split = {p.days - 2: "valid", p.days - 1: "test"}.get(day, "train")
            requests, reward = simulation.serve_day(day, whole=split != "train")
            writer.add(without_day(requests), day=day_name(START + day), split=split)
            if split == "train":
                candidates = requests.lists("candidates").values
                viewed = np.nan_to_num(requests.lists("effective_view").values)
                views += np.bincount(candidates, weights=viewed, minlength=p.items)
            else:
                found = {"incumbent": float(reward.mean()), **bounds(simulation.truth, requests, views)}
                ceilings |= {f"{split}/{name}": value for name, value in found.items()}
        dataclasses.replace(simulation.truth, ceilings=ceilings).save(writer.temporary)
        provenance = {"world": world, "seed": seed, "parameters": dataclasses.asdict(p)}
        return writer.finish(dataclasses.replace(_schema(simulation.world), provenance=provenance))


class Simulation:
    """A world, its users' memory and its incumbent, served a day at a time."""

    def __init__(self, parameters: Parameters, seed: int, chunk: int = BLOCK) -> None:
        self.world = draw_world(parameters, seed)
        self.truth = self.world.truth
        self.chunk = chunk
        self.visits = draw_visits(parameters, seed)
        self.group = login_groups(parameters, self.visits)
        self.incumbent = Incumbent(self.truth, seed)
        self.feedback = Feedback(parameters, self.truth.arrays["item.length"], seed)
        self.sample = np.random.default_rng([seed, 5])
        upload_type = self.world.catalogue["upload_type"]
        assert isinstance(upload_type, np.ndarray)
        self.memory = Memory.empty(parameters, upload_type)

    def serve_day(self, day: int, *, whole: bool) -> tuple[Requests, np.ndarray]:
        """The requests of a day in time order, with their `day`; and the true reward per item of each one's ten.

        Args:
            whole: log all that was retrieved, not a sample.
        """
        today = np.flatnonzero(self.visits.day == day)
        nth = self.visits.nth[today]
        served = []
        for turn in range(nth.max() + 1):
            rows = today[nth == turn]  # every user once: all remember what they did in the turns before
            served += [self._serve(rows[piece], whole=whole) for piece in blocks(len(rows), self.chunk)]
        requests = concatenate_requests([part for part, _ in served])
        order = np.argsort(requests.scalars("timestamp"), kind="stable")
        return requests.take(order), np.concatenate([reward for _, reward in served])[order]

    def _serve(self, rows: np.ndarray, *, whole: bool) -> tuple[Requests, np.ndarray]:
        user, timestamp = self.visits.user[rows], self.visits.timestamp[rows]
        columns: dict[str, Column] = {
            "request_id": rows,
            "timestamp": timestamp,
            "group": self.group[user],
            "day": (START + self.visits.day[rows]).astype(np.int32),
            **{name: values[user] for name, values in self.world.users.items()},
            **self.memory.recall(user),
        }
        logged = self.incumbent.serve(Requests(columns))
        exposed = logged.passed == 4
        shape = len(rows), self.truth.parameters.exposed
        items = logged.items[exposed]
        chances = Chances(*(chance[exposed.ravel()] for chance in logged.chances))
        labels = self.feedback(chances, items)
        self.memory.keep(
            user,
            timestamp,
            items.reshape(shape),
            {name: values.reshape(shape) for name, values in labels.items()},
            logged.best_ranked(self.truth.parameters.competitors),
        )
        known = self._known(logged.passed) | whole
        return Requests(columns | _candidates(logged, exposed, labels, known)), logged.reward

    def _known(self, passed: np.ndarray) -> np.ndarray:
        """What training days log: all that entered re-ranking, and so many of what each stage before cut."""
        keys = self.sample.random(passed.shape)
        known = passed >= 3
        for cut in range(3):
            chosen = np.zeros_like(known)
            first = top(np.where(passed == cut, keys, -1.0), self.truth.parameters.sampled)
            np.put_along_axis(chosen, first, True, axis=1)
            known |= chosen & (passed == cut)  # where fewer were cut, others were chosen too
        return known


def _candidates(
    logged: Logged, exposed: np.ndarray, labels: dict[str, np.ndarray], known: np.ndarray
) -> dict[str, Column]:
    """The candidate columns of the logged part; labels are NaN but on exposures."""
    offsets = offsets_of(known.sum(axis=1))
    columns: dict[str, Column] = {
        "candidates": Ragged(logged.items[known].astype(np.int32), offsets),
        "stages": Ragged(stage_flags(logged)[known], offsets),
        "rank_index": Ragged(logged.rank_index[known], offsets),
        "rerank_index": Ragged(logged.rerank_index[known], offsets),
    }
    for name, values in labels.items():
        whole = np.full(exposed.shape, np.nan, np.float32)
        whole[exposed] = values
        columns[name] = Ragged(whole[known], offsets)
    return columns


def stage_flags(logged: Logged) -> np.ndarray:
    """`Stage` flags of what retrieval kept, uint16 [R, retrieved]; RecFlow's words (2.1)."""
    flags = {
        Stage.PRERANK_NEG: logged.passed == 0,
        Stage.COARSE_NEG: logged.passed == 1,
        Stage.RANKED: logged.passed >= 2,
        Stage.RANK_NEG: logged.passed == 2,
        Stage.RANK_POS: (logged.rank_index >= 0) & (logged.rank_index < LIST),
        Stage.RERANKED: logged.passed >= 3,
        Stage.RERANK_POS: (logged.rerank_index >= 0) & (logged.rerank_index < LIST),
        Stage.RERANK_NEG: logged.rerank_index >= LIST,
        Stage.EXPOSED: logged.passed == 4,
    }
    total = np.zeros(logged.passed.shape, np.uint16)
    for flag, mask in flags.items():
        total |= np.where(mask, np.uint16(flag), np.uint16(0))
    return total


def bounds(truth: Truth, requests: Requests, views: np.ndarray) -> dict[str, float]:
    """Mean true reward per item of the ten that others than the incumbent would serve to these requests.

    random: any that can be shown, in expectation. popularity: the most viewed on training days. oracle: the best.
    light_oracle: the best for one who knows all but the cross effects.
    """
    totals: dict[str, float] = dict.fromkeys(("random", "popularity", "light_oracle", "oracle"), 0.0)
    for rows in blocks(len(requests)):
        block = requests.take(rows)
        free, reward = truth.free(block), truth.rewards(block)
        totals["random"] += (reward.sum(axis=1) / free.sum(axis=1)).sum()
        scores = {
            "popularity": np.where(free, views, -1.0),
            "light_oracle": truth.rewards(block, crossed=False),
            "oracle": reward,
        }
        for name, score in scores.items():
            totals[name] += np.take_along_axis(reward, top(score, LIST), axis=1).mean(axis=1).sum()
    return {name: float(total / len(requests)) for name, total in totals.items()}


def without_day(requests: Requests) -> Requests:
    """The columns of a request file: `day` is in its path."""
    return Requests({name: column for name, column in requests.columns.items() if name != "day"})


def _schema(world: World) -> Schema:
    watched = Feature(name="watched", level="event", kind="id", size=len(WATCHED) + 2)
    return Schema(
        name="simulated",
        items=world.truth.parameters.items,
        features=(*world.features, watched),
        histories=histories(world.truth.parameters),
        labels=LABELS,
        stages=tuple(flag.name.lower() for flag in Stage if flag.name and flag != Stage.RANDOM),
        input_space={"pre_ranking": ("prerank_neg", "coarse_neg", "ranked"), "ranking": ("ranked",)},
        orders=("rank_index", "rerank_index"),
        matures_after={"dwm": MATURES},
    )
