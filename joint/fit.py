"""Whether a config fits a dataset: features, id spaces, histories, labels, stages and pools, by name and kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from joint import settings
from joint.config import Mistake, mistakes, unknown_names
from joint.data.dataset import Dataset
from joint.data.predictions import Predictions, open_predictions, scored
from joint.errors import DataError
from joint.experiment import Config, Data, Encoder, heads_of, logged_scores
from joint.objectives import ItemViews, MultiClass
from joint.schema import NEVER, STAGES, Feature, Schema, read_schema
from towers.retrieval import Retrieval
from towers.sequence import SelfAttention, TargetAttention

MOST_SAID = 8  # mistakes that are said in full before anything runs


def load_fitting(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Config, Dataset]:
    """Read an experiment and open its dataset: what is wrong with either, or with both together, is said at once.

    Raises:
        ConfigError: one line per mistake; of those after the first few their places.
    """
    tree = settings.read(path, overrides)
    config, problems = settings.attempt(tree, Config)
    dataset = None
    if config is not None:
        found = list(mistakes(config))
        told = {path for path, _ in found}  # by the config alone: what the dataset has to say of them would be the same
        dataset, unread = _open(config.data)
        found += [(path, said) for path, said in misfits(config, dataset) if path not in told] if dataset else unread
        problems += settings.at(tree, found)
    settings.raise_all(problems, most=MOST_SAID)
    assert config is not None
    assert dataset is not None
    return config, dataset


def _open(data: Data) -> tuple[Dataset | None, list[Mistake]]:
    """The dataset, or what is in the way."""
    where = "data.scores"
    try:
        predictions = predictions_of(data)
        where = "data.path"
        return Dataset(data.path, predictions=predictions), []
    except DataError as error:
        return None, [(where, str(error))]


def predictions_of(data: Data) -> Predictions | None:
    """What `data.scores` names; None where it names nothing. DataError if that is not of this dataset."""
    return open_predictions(data.predictions, Path(data.path), data.train) if data.scores else None


def schema_of(data: Data) -> Schema:
    """The schema of a config's dataset, with the columns of `data.scores` beside its own."""
    return scored(read_schema(Path(data.path)), predictions_of(data))


def data_hash(data: Data) -> str:
    """What a config reads: the hash of its dataset, and that of its predictions where it has some."""
    predictions = predictions_of(data)
    return read_schema(Path(data.path)).hash + (f"+{predictions.hash}" if predictions else "")


def check_against(config: Config, tree: settings.Tree, schema: Schema, *, training: bool = True) -> None:
    """Check names against a dataset: features, id spaces, histories, labels and stages.

    Args:
        training: also what a finished run does without, the scores of a logged teacher.

    Raises:
        ConfigError: one line per mistake, all of them.
    """
    settings.raise_at(tree, [*_misfits(config, schema), *(_unscored(config, schema) if training else ())])


def misfits(config: Config, dataset: Dataset) -> Iterator[Mistake]:
    """What a config to be trained names that its dataset lacks: (dotted path, message)."""
    yield from _misfits(config, dataset.schema)
    yield from _unscored(config, dataset.schema)
    yield from _unknown_groups(config, dataset)
    yield from _empty_windows(config, dataset)


def _unscored(config: Config, schema: Schema) -> Iterator[Mistake]:
    wanted = logged_scores(config)
    for name, task in config.tasks.items():
        if task.score in wanted:
            yield from unknown_names(f"tasks.{name}.score", [task.score], schema.scores, "score column")


def check_groups(config: Config, tree: settings.Tree, dataset: Dataset) -> None:
    """ConfigError where a head has fusion weights for a user group that no request of the dataset is of."""
    settings.raise_at(tree, list(_unknown_groups(config, dataset)))


def _unknown_groups(config: Config, dataset: Dataset) -> Iterator[Mistake]:
    named = {
        f"heads.{name}.fusion_by_group.{g}": int(g) for name, h in heads_of(config).items() for g in h.fusion_by_group
    }
    if named:
        last = dataset.largest_group()
        said = f"the dataset's user groups go from 0 to {last}"
        yield from ((path, said) for path, group in named.items() if group > last)


def _empty_windows(config: Config, dataset: Dataset) -> Iterator[Mistake]:
    """A softmax over a window of ranks that the pool does not reach would train nothing."""
    if config.data.pool not in dataset.first_day:
        return
    items = int((dataset.first_day[config.data.pool] < NEVER).sum())
    for name, objective in config.objectives.items():
        if isinstance(objective, MultiClass) and objective.hard and objective.hard[0] >= items:
            yield f"objectives.{name}.hard", f"begins after the last item; the pool has {items:,}"


def _misfits(config: Config, schema: Schema) -> Iterator[Mistake]:
    features = {feature.name: feature for feature in schema.features}
    histories = [history.name for history in schema.histories]
    stages = [
        *schema.stages,
        "random",
        *(g for g, f in STAGES.items() if any(f & STAGES[s] for s in schema.stages)),
    ]
    yield from unknown_names("data.candidates", list(config.data.candidates), stages, "logged stage")
    yield from unknown_names("data.pool", [config.data.pool], ["", *schema.pools], "pool")
    yield from _misfits_of_retrieval(config, schema)
    yield from unknown_names("data.not_eligible", config.data.not_eligible, histories, "history")
    for name, task in config.tasks.items():
        yield from unknown_names(f"tasks.{name}.label", [task.label], schema.labels, "label")
    for field_, part in (("valid", config.evaluation.valid), ("test", config.evaluation.test)):
        if not schema.requests(part) and (field_ == "test" or config.train.evaluate_every_epochs):
            yield f"evaluation.{field_}", f"the dataset has no request in its {part} part"
    if not sum(schema.requests(part) for part in config.data.train):
        yield "data.train", f"the dataset has no request in {' or '.join(config.data.train)}"
    elif config.data.days and not schema.days(config.data.train, config.data.days):
        known = schema.days(config.data.train)
        yield "data.days", f"no request in {' to '.join(config.data.days)}; there are from {known[0]} to {known[-1]}"
    named = [*features, *config.encoders, *config.cross]
    for name in sorted({name for name in named if named.count(name) > 1}):
        section = "encoders" if name in config.encoders else "cross"
        yield f"{section}.{name}", f"{name} is a feature or an encoder already; choose another name"
    used: dict[str, Feature] = {}
    for name, encoder in config.encoders.items():
        path = f"encoders.{name}"
        yield from unknown_names(f"{path}.history", [encoder.history], histories, "history")
        events = schema.history(encoder.history).events if encoder.history in histories else ()
        shapeless = [e for e in encoder.events if e in features and features[e].kind in ("ids", "vector")]
        if shapeless:
            yield f"{path}.events", f"{shapeless[0]} is of kind {features[shapeless[0]].kind}; expected id or float"
        yield from unknown_names(f"{path}.events", encoder.events, events, f"event of {encoder.history}")
        items = [f.name for f in schema.features if f.level == "item"]
        yield from unknown_names(f"{path}.features", encoder.features, items, "item feature")
        width = sum(_width(config, features[f]) for f in encoder.features if f in features)
        if isinstance(encoder.by, SelfAttention) and width % encoder.by.heads:
            yield f"{path}.by.heads", f"{encoder.by.heads} heads do not divide the history's width {width}"
        if encoder.competing and encoder.history in histories and not schema.history(encoder.history).competitors:
            yield f"{path}.competing", f"the dataset logs no competitors of the events of {encoder.history}"
        used |= {f: features[f] for f in (*encoder.features, *encoder.events) if f in features}
    for name, cross in config.cross.items():
        path = f"cross.{name}"
        yield from unknown_names(f"{path}.history", [cross.history], histories, "history")
        ids = [f.name for f in schema.features if f.level == "item" and f.kind == "id"]
        yield from unknown_names(f"{path}.feature", [cross.feature], ids, "item feature of one id")
    for name, head in heads_of(config).items():
        known = [*(f.name for f in schema.features if f.level != "event"), *config.encoders, *config.cross]
        yield from unknown_names(f"heads.{name}.features", head.features, known, "feature, encoder or cross feature")
        used |= {f: features[f] for f in head.features if f in features}
        yield from _sides(f"heads.{name}.features", config, head.features, features)
        if isinstance(head, Retrieval) and head.trunk is None:
            yield from _bare_vectors(f"heads.{name}.dim", config, head, features)
        if isinstance(head, Retrieval) and head.gate is not None:
            of_items = [n for n in head.gate.prior if n in features and features[n].level == "item"]
            if of_items:
                yield f"heads.{name}.gate.prior", f"{of_items[0]} is of the item; the gate weighs the user side"
        crossed = [e for e in head.features if e in config.encoders and _sees_candidate(config.encoders[e])]
        crossed += [e for e in head.features if e in config.cross]
        if crossed and name != "ranking":
            yield (
                f"heads.{name}.features",
                f"{crossed[0]} is of a user and a candidate together; only the ranking head reads such features",
            )
    spaces = {feature.space for feature in used.values() if feature.kind in ("id", "ids")}
    for space in sorted(spaces - set(config.tables)):
        yield "tables", f"no table {space!r}, which features in use need"
    for space in sorted(set(config.tables) - {f.space for f in schema.features}):
        yield (
            f"tables.{space}",
            f"the dataset has no id space {space!r}{settings.near_miss(space, sorted(spaces))}",
        )


def _misfits_of_retrieval(config: Config, schema: Schema) -> Iterator[Mistake]:
    """Of how retrieval is measured, and of the views of its items."""
    histories = [history.name for history in schema.histories]
    values = [f.name for f in schema.features if f.level == "item" and f.kind == "id"]
    varied, explore = config.evaluation.variety, config.evaluation.explore
    yield from unknown_names("evaluation.variety", [varied], ["", *values], "item feature of one id")
    if explore is not None:
        yield from unknown_names("evaluation.explore.history", [explore.history], histories, "history")
        if explore.noise and not varied:
            yield "evaluation.explore.noise", "is stronger for narrow interests: evaluation.variety must say in what"
    for name, pool in config.evaluation.pools.items():
        yield from unknown_names(f"evaluation.pools.{name}.pool", [pool.pool], ["", *schema.pools], "pool")
    retrieval = config.heads.retrieval
    of_items = {feature.name for feature in schema.features if feature.level == "item"}
    read = of_items & {*retrieval.features} if retrieval else of_items
    for name, objective in config.objectives.items():
        if isinstance(objective, ItemViews) and len(read) < 2:
            yield f"objectives.{name}", "deals the item's features to two views; heads.retrieval.features has one"


def _sides(path: str, config: Config, names: Sequence[str], features: Mapping[str, Feature]) -> Iterator[Mistake]:
    """A head needs something of the request and something of the item."""
    encoders = [config.encoders[name] for name in names if name in config.encoders]
    levels = {features[name].level for name in names if name in features}
    if "request" not in levels and all(_sees_candidate(encoder) for encoder in encoders):
        yield path, "names nothing of the request; expected a request feature or an encoder of a history"
    if "item" not in levels:
        yield path, "names nothing of the item; expected an item feature"


def _bare_vectors(path: str, config: Config, head: Retrieval, features: Mapping[str, Feature]) -> Iterator[Mistake]:
    """Without towers, the columns of either side are its vector."""
    encoded = [config.encoders[name].features for name in head.features if name in config.encoders]
    of_user = [name for name in head.features if name in features and features[name].level == "request"]
    of_user += [name for names in encoded for name in names]
    of_item = [name for name in head.features if name in features and features[name].level == "item"]
    user, item = (sum(_width(config, features[n]) for n in names if n in features) for names in (of_user, of_item))
    if not user == item == head.dim:
        yield path, f"is {head.dim}; without a trunk it is the width of user and item, which are {user} and {item}"


def _width(config: Config, feature: Feature) -> int:
    if feature.kind in ("float", "vector"):
        return feature.size or 1
    return config.tables[feature.space].dim if feature.space in config.tables else 1


def _sees_candidate(encoder: Encoder) -> bool:
    return isinstance(encoder.by, TargetAttention)
