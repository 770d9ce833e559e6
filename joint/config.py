"""One experiment as frozen dataclasses, and the checks that need more than one of them.

`python -m joint.config FILE [key=value ...]` prints the resolved config, or every mistake in it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from joint import settings
from joint.commands import run_command
from joint.data.sampling import Quota
from joint.objectives import AdaptiveContrastive, Distillation, Head, MultiClass, Objective, spaces_of
from joint.schema import POOL_TOKENS, SPACE_TOKENS, STAGES, Feature, Schema
from towers.pre_ranking import PreRanking
from towers.ranking import Ranking
from towers.retrieval import Retrieval
from towers.sequence import Mean, SelfAttention, TargetAttention


def _at_least(minimum: float, **values: float) -> None:
    """Raise one ValueError with a line for every value below `minimum` (NaN included)."""
    wrong = {name: value for name, value in values.items() if not value >= minimum}
    if wrong:
        raise ValueError(
            "\n".join(f"{name} must be at least {minimum}, found {found}" for name, found in wrong.items())
        )


@dataclass(frozen=True, kw_only=True)
class Run:
    """Where a run is kept (`DIR/NAME`), and the one seed of everything random in it."""

    name: str
    dir: str = "runs"
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.name or Path(self.name).name != self.name:
            raise ValueError(f"name must be one plain folder name, found {self.name!r}")


@dataclass(frozen=True, kw_only=True)
class Data:
    """What is read, and what a batch is made of."""

    path: str
    train: tuple[Literal["train", "valid", "test"], ...] = ("train",)
    requests_per_batch: int = 256  # global: shared out over the ranks
    epochs: int = 1
    shards: int = 8  # virtual shards a day is dealt into: a multiple of every world size to be used
    candidates: dict[str, Quota]  # stage -> how many of a request's candidates, 'all', or random draws
    not_eligible: tuple[str, ...] = ()  # histories whose items are never recommended again

    def __post_init__(self) -> None:
        _at_least(1, requests_per_batch=self.requests_per_batch, shards=self.shards, epochs=self.epochs)
        if self.requests_per_batch % self.shards:
            raise ValueError(f"requests_per_batch {self.requests_per_batch} is not a multiple of shards {self.shards}")
        for stage, quota in self.candidates.items():
            if quota != "all" and quota < 0:
                raise ValueError(f"candidates: {stage} must be 'all' or at least 0, found {quota}")


@dataclass(frozen=True, kw_only=True)
class Task:
    """A kind of feedback to predict, from a label column; a value of `at_least` or more counts as positive."""

    label: str
    at_least: float = 1.0
    kind: Literal["binary", "ratio"] = "binary"  # ratio: the label itself, clipped to [0, 1]

    def __post_init__(self) -> None:
        _at_least(-math.inf, at_least=self.at_least)


@dataclass(frozen=True, kw_only=True)
class Table:
    """An embedding table; `auto` rows are as many as the dataset has ids."""

    rows: int | Literal["auto"] = "auto"
    dim: int
    sharding: Literal["auto", "table_wise", "row_wise"] = "auto"
    init: float = 0.05  # rows start uniform in [-init, init]

    def __post_init__(self) -> None:
        _at_least(1, dim=self.dim, **({} if self.rows == "auto" else {"rows": self.rows}))
        _at_least(0, init=self.init)


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """A named reading of a history, which heads list among their features."""

    history: str
    features: tuple[str, ...]  # item features of each past item
    events: tuple[str, ...] = ()  # event features, projected and added to the item's
    length: int = 50  # newest events read
    by: Mean | SelfAttention | TargetAttention

    def __post_init__(self) -> None:
        _at_least(1, length=self.length)
        if not self.features:
            raise ValueError("features names no item feature; expected at least one")


@dataclass(frozen=True, kw_only=True)
class Heads:
    """The stages of the funnel; any may be absent."""

    retrieval: Retrieval | None = None
    pre_ranking: PreRanking | None = None
    ranking: Ranking | None = None


@dataclass(frozen=True, kw_only=True)
class TableOptimizer:
    """The fused optimizer of all tables, applied in the backward pass. Row-wise: one float of state per row."""

    kind: Literal["rowwise_adagrad", "adagrad", "sgd"] = "rowwise_adagrad"
    lr: float = 0.1

    def __post_init__(self) -> None:
        _at_least(0, lr=self.lr)


@dataclass(frozen=True, kw_only=True)
class DenseOptimizer:
    """The optimizer of everything that is not a table."""

    kind: Literal["adam", "adamw"] = "adam"
    lr: float = 1e-3
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _at_least(0, lr=self.lr, weight_decay=self.weight_decay)


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Both optimizers, and a linear warm-up they share."""

    tables: TableOptimizer = TableOptimizer()
    dense: DenseOptimizer = DenseOptimizer()
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        _at_least(0, warmup_steps=self.warmup_steps)


@dataclass(frozen=True, kw_only=True)
class Train:
    """How often a run speaks and saves, in steps, and looks at its validation part, in epochs (0: never)."""

    log_every: int = 10
    checkpoint_every: int = 100
    keep: int = 2
    evaluate_every_epochs: int = 1

    def __post_init__(self) -> None:
        _at_least(1, log_every=self.log_every, checkpoint_every=self.checkpoint_every, keep=self.keep)
        _at_least(0, evaluate_every_epochs=self.evaluate_every_epochs)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is measured, on which part, and the quotas of the funnel."""

    valid: Literal["train", "valid", "test"] = "valid"
    test: Literal["train", "valid", "test"] = "test"
    task: str  # whose positives are what a head should find
    k: tuple[int, ...] = (20, 100)
    quotas: dict[str, int] = field(default_factory=dict)  # head -> candidates it keeps, in the funnel's order
    whole_catalogue: tuple[Head, ...] = ()  # heads besides retrieval that also score every item for every request
    candidates_per_batch: int = 65_536  # rows scored at once where heads score the whole catalogue
    baselines: bool = False  # popularity, item-kNN, EASE and smoothed means beside the heads, on the same split

    def __post_init__(self) -> None:
        _at_least(1, candidates_per_batch=self.candidates_per_batch)
        if not self.k:
            raise ValueError("k is empty; expected at least one cut, such as [20, 100]")
        _at_least(1, **{f"k: {k}": k for k in self.k}, **{f"quotas.{head}": n for head, n in self.quotas.items()})


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything one experiment is."""

    run: Run
    data: Data
    tasks: dict[str, Task]
    tables: dict[str, Table]
    encoders: dict[str, Encoder] = field(default_factory=dict)
    heads: Heads
    objectives: dict[str, Objective]
    optimizer: Optimizer = Optimizer()
    train: Train = Train()
    evaluation: Evaluation


HEADS = ("retrieval", "pre_ranking", "ranking")


def heads_of(config: Config) -> dict[str, Retrieval | PreRanking | Ranking]:
    """The heads a config has, in the funnel's order."""
    found = {name: getattr(config.heads, name) for name in HEADS}
    return {name: head for name, head in found.items() if head is not None}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Config, settings.Tree]:
    """Read and check an experiment; the tree remembers where each value was written, for later checks.

    Raises:
        ConfigError: one line per mistake, all of them.
    """
    tree = settings.read(path, overrides)
    config = settings.decode(tree, Config)
    settings.raise_at(tree, list(_mistakes(config)))
    return config, tree


def check_against(config: Config, tree: settings.Tree, schema: Schema) -> None:
    """Check names against a dataset: features, id spaces, histories, labels and stages.

    Raises:
        ConfigError: one line per mistake, all of them.
    """
    settings.raise_at(tree, list(_misfits(config, schema)))


Mistake = tuple[str, str]


def _unknown(path: str, names: Sequence[str], known: Sequence[str], what: str) -> Iterator[Mistake]:
    for name in names:
        if name not in known:
            yield path, f"no {what} {name!r}{settings.near_miss(name, known)}"


def _mistakes(config: Config) -> Iterator[Mistake]:
    heads = heads_of(config)
    if not heads:
        yield "heads", "no head; expected at least one of retrieval, pre_ranking, ranking"
    if not config.objectives:
        yield "objectives", "none; expected at least one"
    if config.evaluation.test in config.data.train or len(set(config.data.train)) < len(config.data.train):
        yield "data.train", f"names {config.evaluation.test}, which evaluation.test measures on, or a part twice"
    quotas = config.evaluation.quotas
    if quotas and list(quotas) != [head for head in HEADS if head in quotas or head == "retrieval"]:
        yield "evaluation.quotas", f"expected in the funnel's order, from retrieval on; found {', '.join(quotas)}"
    if list(quotas.values()) != sorted(quotas.values(), reverse=True):
        yield "evaluation.quotas", "a head cannot keep more than the one before it left"
    stages = [*STAGES]
    yield from _unknown("data.candidates", list(config.data.candidates), stages, "stage")
    yield from _unknown("evaluation.task", [config.evaluation.task], list(config.tasks), "task")
    yield from _unknown("evaluation.quotas", list(config.evaluation.quotas), list(heads), "head")
    yield from _unknown("evaluation.whole_catalogue", config.evaluation.whole_catalogue, list(heads), "head")
    if "random" in config.data.candidates and config.data.candidates["random"] == "all":
        yield "data.candidates.random", "expected a number of draws, found 'all'"
    if config.evaluation.valid in config.data.train and config.train.evaluate_every_epochs:
        part = config.evaluation.valid
        yield (
            "train.evaluate_every_epochs",
            f"{part} is trained on, so it validates nothing; set 0 or change data.train",
        )
    for name, head in heads.items():
        yield from _unknown(f"heads.{name}.fusion", list(head.fusion), list(config.tasks), "task")
    for name, objective in config.objectives.items():
        yield from _objective_mistakes(config, f"objectives.{name}", objective)


def _objective_mistakes(config: Config, path: str, objective: Objective) -> Iterator[Mistake]:
    yield from _unknown(f"{path}.tasks", objective.tasks, list(config.tasks), "task")
    if len(set(objective.tasks)) < len(objective.tasks):
        yield f"{path}.tasks", f"names a task twice: {', '.join(objective.tasks)}"
    heads = list(heads_of(config))
    yield from _unknown(f"{path}.head", [objective.head], heads, "head")
    tokens = {token for spaces in spaces_of(objective).values() for token in spaces} | set(objective.space)
    yield from _unknown(f"{path}.space", sorted(tokens), SPACE_TOKENS, "space")
    pooled = sorted(tokens & set(POOL_TOKENS))
    if isinstance(objective, MultiClass):
        if objective.head != "retrieval" or tuple(objective.space) != ("corpus",):
            yield path, "multi_class trains the retrieval head over space [corpus]"
    elif pooled:
        yield (
            f"{path}.space",
            f"{objective.loss} compares candidates of a request; {pooled[0]} is not among them",
        )
    if isinstance(objective, AdaptiveContrastive) and objective.head != "pre_ranking":
        yield f"{path}.head", "adaptive weights compare the pre_ranking head's gated item side; no other head has one"
    if isinstance(objective, Distillation):
        yield from _unknown(f"{path}.teacher", [objective.teacher], heads, "head")
        if objective.teacher == objective.head:
            yield f"{path}.teacher", "a head cannot teach itself"
    sampled = [STAGES[name] for name, quota in config.data.candidates.items() if name in STAGES and quota]
    for token in sorted(tokens - set(POOL_TOKENS)):
        drawn = "exposed" if token in ("positive", "exposed_neg") else token
        flags = STAGES.get(drawn)
        if flags is not None and not any(stage & flags for stage in sampled):
            yield f"{path}.space", f"{token} holds nothing: data.candidates draws no {drawn}"


def _misfits(config: Config, schema: Schema) -> Iterator[Mistake]:
    features = {feature.name: feature for feature in schema.features}
    histories = [history.name for history in schema.histories]
    stages = [
        *schema.stages,
        "random",
        *(g for g, f in STAGES.items() if any(f & STAGES[s] for s in schema.stages)),
    ]
    yield from _unknown("data.candidates", list(config.data.candidates), stages, "logged stage")
    yield from _unknown("data.not_eligible", config.data.not_eligible, histories, "history")
    for name, task in config.tasks.items():
        yield from _unknown(f"tasks.{name}.label", [task.label], schema.labels, "label")
    for field_, part in (("valid", config.evaluation.valid), ("test", config.evaluation.test)):
        if not schema.requests(part) and (field_ == "test" or config.train.evaluate_every_epochs):
            yield f"evaluation.{field_}", f"the dataset has no request in its {part} part"
    if not sum(schema.requests(part) for part in config.data.train):
        yield "data.train", f"the dataset has no request in {' or '.join(config.data.train)}"
    used: dict[str, Feature] = {}
    for name, encoder in config.encoders.items():
        path = f"encoders.{name}"
        yield from _unknown(f"{path}.history", [encoder.history], histories, "history")
        events = schema.history(encoder.history).events if encoder.history in histories else ()
        yield from _unknown(f"{path}.events", encoder.events, events, f"event of {encoder.history}")
        items = [f.name for f in schema.features if f.level == "item"]
        yield from _unknown(f"{path}.features", encoder.features, items, "item feature")
        width = sum(_width(config, features[f]) for f in encoder.features if f in features)
        if isinstance(encoder.by, SelfAttention) and width % encoder.by.heads:
            yield f"{path}.by.heads", f"{encoder.by.heads} heads do not divide the history's width {width}"
        used |= {f: features[f] for f in (*encoder.features, *encoder.events) if f in features}
    for name, head in heads_of(config).items():
        known = [f.name for f in schema.features if f.level != "event"] + list(config.encoders)
        yield from _unknown(f"heads.{name}.features", head.features, known, "feature or encoder")
        used |= {f: features[f] for f in head.features if f in features}
        yield from _sides(f"heads.{name}.features", config, head.features, features)
        crossed = [e for e in head.features if e in config.encoders and _sees_candidate(config.encoders[e])]
        if crossed and name != "ranking":
            yield (
                f"heads.{name}.features",
                f"{crossed[0]} attends from each candidate; its vectors could not be cached",
            )
    spaces = {feature.space for feature in used.values() if feature.kind != "float"}
    for space in sorted(spaces - set(config.tables)):
        yield "tables", f"no table {space!r}, which features in use need"
    for space in sorted(set(config.tables) - {f.space for f in schema.features}):
        yield (
            f"tables.{space}",
            f"the dataset has no id space {space!r}{settings.near_miss(space, list(spaces))}",
        )


def _sides(path: str, config: Config, names: Sequence[str], features: Mapping[str, Feature]) -> Iterator[Mistake]:
    """A head needs something of the request and something of the item."""
    encoders = [config.encoders[name] for name in names if name in config.encoders]
    levels = {features[name].level for name in names if name in features}
    if "request" not in levels and all(_sees_candidate(encoder) for encoder in encoders):
        yield path, "names nothing of the request; expected a request feature or an encoder of a history"
    if "item" not in levels:
        yield path, "names nothing of the item; expected an item feature"


def _width(config: Config, feature: Feature) -> int:
    return config.tables[feature.space].dim if feature.space in config.tables else 1


def _sees_candidate(encoder: Encoder) -> bool:
    return isinstance(encoder.by, TargetAttention)


def main() -> int:
    """Print the resolved config; returns the exit code."""
    parser = argparse.ArgumentParser(prog="joint.config", description="Print a config as resolved, or its mistakes.")
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    config, _ = load_config(arguments.config, arguments.overrides)
    print(settings.dump(config), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
