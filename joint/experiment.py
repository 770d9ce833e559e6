"""One experiment as frozen dataclasses: what a config file may say, section by section."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Literal

from joint.data.cross import Cross
from joint.data.sampling import Quota
from joint.objectives import Distillation, Head, Imitation, Objective
from towers.pre_ranking import PreRanking
from towers.ranking import Ranking
from towers.retrieval import Retrieval
from towers.sequence import Competing, Reading


def _at_least(minimum: float, **values: float) -> None:
    """Raise one ValueError with a line for every value below `minimum` (NaN included)."""
    wrong = {name: value for name, value in values.items() if not value >= minimum}
    if wrong:
        raise ValueError(
            "\n".join(f"{name} must be at least {minimum}, found {found}" for name, found in wrong.items())
        )


def _check_days(days: tuple[str, str] | None) -> None:
    """ValueError unless these are two days, the first no later than the last."""
    for day in days or ():
        if not re.fullmatch(r"\d{4}-\d\d-\d\d", day):
            raise ValueError(f"days: {day!r} is no day; expected YYYY-MM-DD")
        try:
            date.fromisoformat(day)
        except ValueError as error:
            raise ValueError(f"days: {day!r} is no day ({error})") from error
    if days and days[0] > days[1]:
        raise ValueError(f"days end on {days[1]}, before they begin on {days[0]}")


@dataclass(frozen=True, kw_only=True)
class Run:
    """Where a run is kept (`DIR/NAME`), and the one seed of everything random in it."""

    name: str  # the folder of the run in `dir`
    dir: str = "runs"  # relative to where the command is called
    seed: int = 0  # of initial values, the order of requests and all draws

    def __post_init__(self) -> None:
        if not self.name or Path(self.name).name != self.name:
            raise ValueError(f"name must be one plain folder name, found {self.name!r}")


@dataclass(frozen=True, kw_only=True)
class Data:
    """What is read, and what a batch is made of."""

    path: str  # a prepared dataset
    scores: str = ""  # what joint.predict wrote of this dataset; {dataset} in it stands for the folder name of `path`
    train: tuple[Literal["train", "valid", "test"], ...] = ("train",)  # the parts that are trained on
    days: tuple[str, str] | None = None  # the first and the last day to train on (YYYY-MM-DD); null: all there are
    requests_per_batch: int = 256  # global: shared out over the ranks
    epochs: int = 1  # passes over them
    shards: int = 8  # virtual shards a day is dealt into: a multiple of every world size to be used
    candidates: dict[str, Quota]  # stage -> how many of a request's candidates, 'all', or random draws
    random_by: Literal["uniform", "popularity"] = "uniform"  # how random candidates of a request are drawn
    shuffle_stages: bool = False  # a placebo: stages dealt anew among a request's candidates that were not exposed
    shared_random: int = 0  # random items of a batch that softmaxes over space `random` set all its requests against
    pool: str = ""  # the part of the catalogue that is recommended from; '' is all of it
    not_eligible: tuple[str, ...] = ()  # histories whose items are never recommended again

    def __post_init__(self) -> None:
        _at_least(1, requests_per_batch=self.requests_per_batch, shards=self.shards, epochs=self.epochs)
        _at_least(0, shared_random=self.shared_random)
        if self.requests_per_batch % self.shards:
            raise ValueError(f"requests_per_batch {self.requests_per_batch} is not a multiple of shards {self.shards}")
        _check_days(self.days)
        for stage, quota in self.candidates.items():
            if quota != "all" and quota < 0:
                raise ValueError(f"candidates: {stage} must be 'all' or at least 0, found {quota}")

    @property
    def predictions(self) -> Path:
        """The folder that `scores` names."""
        return Path(self.scores.replace("{dataset}", Path(self.path).name))


@dataclass(frozen=True, kw_only=True)
class Task:
    """A kind of feedback to predict, from a label column; a value of `at_least` or more counts as positive.

    `binary`: whether it is positive. `ratio`: the value itself, clipped to [0, 1]. `weighted`: whether it is positive,
    each positive weighing its value, so that the odds estimate the expected value, such as minutes (RRA Eq 2).
    """

    label: str  # a label of the dataset
    at_least: float = 1.0
    kind: Literal["binary", "ratio", "weighted"] = "binary"
    matures_after: float | None = None  # days until the label is known; null: as the dataset says
    score: str = ""  # the column of logits that a `teacher: logged` has for this task

    def __post_init__(self) -> None:
        _at_least(-math.inf, at_least=self.at_least)
        if self.kind == "weighted" and self.at_least <= 0:
            raise ValueError(f"at_least must be above 0 for a weighted task, found {self.at_least}")
        _at_least(0, **({} if self.matures_after is None else {"matures_after": self.matures_after}))


@dataclass(frozen=True, kw_only=True)
class Table:
    """An embedding table; `auto` rows are as many as the dataset has ids.

    `sharding`: on one rank (table_wise), its rows over all (row_wise), by its size (auto), or as TorchRec's planner
    decides. `memory`, on CUDA: that of the GPU, of the host (uvm), or of the host behind a cache on the GPU.
    """

    rows: int | Literal["auto"] = "auto"  # row 0 is the unknown
    dim: int  # width of a row
    sharding: Literal["auto", "table_wise", "row_wise", "planner"] = "auto"
    memory: Literal["device", "uvm", "uvm_caching"] = "device"
    hash: bool = False  # ids to rows by a 64-bit hash: any number of ids in `rows` rows, some of which they share
    init: float = 0.05  # rows start uniform in [-init, init]

    def __post_init__(self) -> None:
        _at_least(1, dim=self.dim, **({} if self.rows == "auto" else {"rows": self.rows}))
        if self.hash and (self.rows == "auto" or self.rows < 2):
            raise ValueError(f"hash needs a number of rows, at least 2; found rows {self.rows}")
        _at_least(0, init=self.init)


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """A named reading of a history, which heads list among their features."""

    history: str  # a history of the dataset
    features: tuple[str, ...]  # item features of each past item
    events: tuple[str, ...] = ()  # event features, projected to the item's width
    combine: Literal["add", "multiply"] = "add"  # how they join the item: RRA 4.2.1 multiplies
    competing: Competing | None = None  # each event becomes what it won against (RecFlow A.6)
    length: int = 50  # newest events read
    by: Reading

    def __post_init__(self) -> None:
        _at_least(1, length=self.length)
        if not self.features:
            raise ValueError("features names no item feature; expected at least one")
        if len({*self.features, *self.events}) < len(self.features) + len(self.events):
            raise ValueError("features or events name a feature twice")
        if self.combine == "multiply" and not self.events:
            raise ValueError("combine multiply has no events to multiply by")


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """What the heads have in common, and which of them only read it: theirs is no gradient to what is shared."""

    mode: Literal["none", "tables", "tables_and_encoders"] = "tables_and_encoders"  # what heads share
    stop_gradient: tuple[Head, ...] = ()  # heads that read what is shared and do not train it

    def __post_init__(self) -> None:
        if self.stop_gradient and self.mode == "none":
            raise ValueError("stop_gradient names heads, but with mode none nothing is shared that they could spare")


@dataclass(frozen=True, kw_only=True)
class Heads:
    """The stages of the funnel; any may be absent."""

    retrieval: Retrieval | None = None
    pre_ranking: PreRanking | None = None
    ranking: Ranking | None = None


@dataclass(frozen=True, kw_only=True)
class TableOptimizer:
    """The fused optimizer of all tables, applied in the backward pass. Row-wise: one float of state per row.

    FBGEMM has Adam (two floats of state per weight) for CUDA alone.
    """

    kind: Literal["rowwise_adagrad", "adagrad", "sgd", "adam"] = "rowwise_adagrad"
    lr: float = 0.1  # learning rate

    def __post_init__(self) -> None:
        _at_least(0, lr=self.lr)


@dataclass(frozen=True, kw_only=True)
class DenseOptimizer:
    """The optimizer of everything that is not a table."""

    kind: Literal["adam", "adamw"] = "adam"
    lr: float = 1e-3  # learning rate
    weight_decay: float = 0.0  # of adam into the gradient, of adamw beside it

    def __post_init__(self) -> None:
        _at_least(0, lr=self.lr, weight_decay=self.weight_decay)


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Both optimizers, and a linear warm-up they share."""

    tables: TableOptimizer = TableOptimizer()
    dense: DenseOptimizer = DenseOptimizer()
    warmup_steps: int = 0  # steps over which both rates rise to their own

    def __post_init__(self) -> None:
        _at_least(0, warmup_steps=self.warmup_steps)


@dataclass(frozen=True, kw_only=True)
class Train:
    """How often a run speaks and saves, in steps, and looks at its validation part, in epochs (0: never).

    `precision` is that of the matrix products of encoders and heads in training; tables, logits, losses and evaluation
    are float32. `fast_lookup` changes no number, only time, on CPU (`joint.fast_lookup`). `threads` may change the last
    digits, since sums are cut elsewhere: so it is said here, and OMP_NUM_THREADS of the environment is not asked.
    """

    log_every: int = 10  # steps between lines and points of the log
    checkpoint_every: int = 100  # steps between checkpoints
    keep: int = 2  # newest checkpoints that are kept
    save_beside_training: bool = False  # copy the state and write it in a thread, rather than wait for the disk
    evaluate_every_epochs: int = 1  # 0: never
    precision: Literal["float32", "bfloat16"] = "float32"
    fast_lookup: bool = True
    threads: int = 1  # of a rank, for arithmetic on the CPU

    def __post_init__(self) -> None:
        _at_least(1, log_every=self.log_every, checkpoint_every=self.checkpoint_every, keep=self.keep)
        _at_least(1, threads=self.threads)
        _at_least(0, evaluate_every_epochs=self.evaluate_every_epochs)


@dataclass(frozen=True, kw_only=True)
class ItemPool:
    """A part of what is recommended from, for which the two-tower model has an index of its own (a channel)."""

    pool: str = ""  # of the dataset; '' is its catalogue
    joined_within: int | None = None  # days: only items that joined it no longer ago; 0 on the day of the request
    quota: int = 0  # places of quotas.retrieval that its best items have for themselves

    def __post_init__(self) -> None:
        _at_least(0, quota=self.quota, **({} if self.joined_within is None else {"joined_within": self.joined_within}))


@dataclass(frozen=True, kw_only=True)
class Explore:
    """Some chance in what retrieval finds: noise on the user's vector, and older events left out of histories.

    `noise` is relative to the vector's length; for users of narrow interests it is up to twice as strong, by how few
    values of `evaluation.variety` the events of `history` have.
    """

    history: str
    noise: float = 0.0
    keep_history: float = 1.0  # the share of events older than the `newest` that is kept
    newest: int = 10  # events that are never left out

    def __post_init__(self) -> None:
        _at_least(0, noise=self.noise, keep_history=self.keep_history, newest=self.newest)
        if self.keep_history > 1:
            raise ValueError(f"keep_history is a share, found {self.keep_history}")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is measured, on which part, and the quotas of the funnel."""

    valid: Literal["train", "valid", "test"] = "valid"  # the part that epochs and choices are judged on
    test: Literal["train", "valid", "test"] = "test"  # the part that the final table is of
    task: str  # whose positives are what a head should find
    k: tuple[int, ...] = (20, 100)  # cuts of recall and its kin
    quotas: dict[str, int] = field(default_factory=dict)  # head -> candidates it keeps, in the funnel's order
    pools: dict[str, ItemPool] = field(default_factory=dict)  # channels of retrieval, in the order of their choice
    variety: str = ""  # item feature of one id, whose different values in the lists of retrieval are counted
    explore: Explore | None = None
    whole_catalogue: tuple[Head, ...] = ()  # heads besides retrieval that also score every item for every request
    candidates_per_batch: int = 65_536  # rows scored at once where heads score the whole catalogue
    reference: str = ""  # a finished run on the same dataset, whose ranking head all heads are held against
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
    cross: dict[str, Cross] = field(default_factory=dict)
    sharing: Sharing = Sharing()
    heads: Heads
    objectives: dict[str, Objective]
    optimizer: Optimizer = Optimizer()
    train: Train = Train()
    evaluation: Evaluation


HEADS = ("retrieval", "pre_ranking", "ranking")
# What other trainers call it -> how its path ends here: the near miss of a key that no section has.
ALSO_CALLED = {
    "batch_size": "data.requests_per_batch",
    "dataset": "data.path",
    "embedding_dim": "tables.NAME.dim",
    "learning_rate": "lr",
    "max_epochs": "data.epochs",
    "num_epochs": "data.epochs",
    "num_workers": "train.threads",
    "output_dir": "run.dir",
    "random_seed": "run.seed",
    "topk": "evaluation.k",
}


def logged_scores(config: Config) -> tuple[str, ...]:
    """The score columns that objectives with `teacher: logged` learn from, each once."""
    taught = {
        task
        for objective in config.objectives.values()
        if isinstance(objective, Distillation | Imitation) and objective.teacher == "logged"
        for task in objective.tasks or config.tasks
    }
    return tuple(dict.fromkeys(task.score for name, task in config.tasks.items() if name in taught))


def heads_of(config: Config) -> dict[str, Retrieval | PreRanking | Ranking]:
    """The heads a config has, in the funnel's order."""
    found = {name: getattr(config.heads, name) for name in HEADS}
    return {name: head for name, head in found.items() if head is not None}
