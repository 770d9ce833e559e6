"""Whether a config fits a dataset: features, id spaces, histories, labels, stages and pools, by name and kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

from joint.config import Head, Mistake, mistakes, read_experiment, unknown_names
from joint.configuring import settings
from joint.configuring.unread import UNREAD, UnreadError, as_far_as_read
from joint.data.dataset import Dataset
from joint.data.predictions import Predictions, open_predictions, scored
from joint.errors import DataError
from joint.experiment import ALSO_CALLED, Config, Data, Encoder, heads_of, logged_scores
from joint.objectives import ItemViews, MultiClass
from joint.schema import NEVER, STAGES, Feature, Schema, read_schema
from towers.retrieval import Retrieval
from towers.sequence import SelfAttention, TargetAttention

MOST_SAID = 10  # lines about mistakes before anything runs


def load_fitting(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Config, Dataset]:
    """Read an experiment and open its dataset: what is wrong with either, or with both together, is said at once.

    Raises:
        ConfigError: one line per mistake; of those after the first few their places.
    """
    tree = read_experiment(path, overrides)
    config, problems = settings.attempt(tree, Config, also_called=ALSO_CALLED)
    found = list(mistakes(config))
    told = {path for path, _ in found}  # by the config alone: what the dataset has to say of them would be the same
    dataset, unopened = _open(config)
    found += [(path, said) for path, said in misfits(config, dataset) if path not in told] if dataset else unopened
    settings.raise_all([*problems, *settings.at(tree, found)], most=MOST_SAID)
    assert dataset is not None
    return config, dataset


def _open(config: Config) -> tuple[Dataset | None, list[Mistake]]:
    """The dataset, or what is in the way; None and nothing where the config's own mistakes are."""
    where = "data.scores"
    with suppress(UnreadError):
        try:
            predictions = predictions_of(config.data)
            where = "data.path"
            return Dataset(config.data.path, predictions=predictions), []
        except DataError as error:
            return None, [(where, str(error))]
    return None, []


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
    yield from as_far_as_read(_unscored(config, dataset.schema))
    yield from as_far_as_read(_unknown_groups(config, dataset))
    yield from as_far_as_read(_empty_windows(config, dataset))


def _unscored(config: Config, schema: Schema) -> Iterator[Mistake]:
    wanted = logged_scores(config)
    for name, task in config.tasks.items():
        if task.score in wanted:
            yield from unknown_names(f"tasks.{name}.score", [task.score], schema.scores, "score column")


def check_groups(config: Config, tree: settings.Tree, dataset: Dataset) -> None:
    """ConfigError where a head has fusion weights for a user group that no request of the dataset is of."""
    settings.raise_at(tree, list(_unknown_groups(config, dataset)))


def _unknown_groups(config: Config, dataset: Dataset) -> Iterator[Mistake]:
    last = cache(dataset.largest_group)  # of all files' footers: once, and only where a head names groups
    for name, head in heads_of(config).items():
        with suppress(UnreadError):
            for group in (group for group in head.fusion_by_group if int(group) > last()):
                yield f"heads.{name}.fusion_by_group.{group}", f"the dataset's user groups go from 0 to {last()}"


def _empty_windows(config: Config, dataset: Dataset) -> Iterator[Mistake]:
    """A softmax over a window of ranks that the pool does not reach would train nothing."""
    if config.data.pool not in dataset.first_day:
        return
    items = int((dataset.first_day[config.data.pool] < NEVER).sum())
    for name, objective in config.objectives.items():
        with suppress(UnreadError):
            if isinstance(objective, MultiClass) and objective.hard and objective.hard[0] >= items:
                yield f"objectives.{name}.hard", f"begins after the last item; the pool has {items:,}"


def _misfits(config: Config, schema: Schema) -> Iterator[Mistake]:
    checks = (
        *(_misfits_of_data, _misfits_of_days, _misfits_of_tasks, _names_given_twice),
        *(_misfits_of_encoders, _misfits_of_crosses, _misfits_of_heads, _misfits_of_tables),
        *(_misfits_of_evaluation, _misfits_of_pools, _misfits_of_views),
    )
    for check in checks:
        yield from as_far_as_read(check(config, schema))


def _misfits_of_data(config: Config, schema: Schema) -> Iterator[Mistake]:
    groups = (group for group, flags in STAGES.items() if any(flags & STAGES[stage] for stage in schema.stages))
    stages = [*schema.stages, "random", *groups]
    yield from unknown_names("data.candidates", config.data.candidates, stages, "logged stage")
    yield from unknown_names("data.pool", [config.data.pool], ["", *schema.pools], "pool")
    yield from unknown_names("data.not_eligible", config.data.not_eligible, _histories(schema), "history")


def _misfits_of_days(config: Config, schema: Schema) -> Iterator[Mistake]:
    if not sum(schema.requests(part) for part in config.data.train):
        yield "data.train", f"the dataset has no request in {' or '.join(config.data.train)}"
    elif config.data.days and not schema.days(config.data.train, config.data.days):
        known = schema.days(config.data.train)
        yield "data.days", f"no request in {' to '.join(config.data.days)}; there are from {known[0]} to {known[-1]}"


def _misfits_of_tasks(config: Config, schema: Schema) -> Iterator[Mistake]:
    for name, task in config.tasks.items():
        with suppress(UnreadError):
            yield from unknown_names(f"tasks.{name}.label", [task.label], schema.labels, "label")


def _names_given_twice(config: Config, schema: Schema) -> Iterator[Mistake]:
    named = [*_features(schema), *config.encoders, *config.cross]
    for name in sorted({name for name in named if named.count(name) > 1}):
        section = "encoders" if name in config.encoders else "cross"
        yield f"{section}.{name}", f"{name} is a feature or an encoder already; choose another name"


def _misfits_of_encoders(config: Config, schema: Schema) -> Iterator[Mistake]:
    for name, encoder in config.encoders.items():
        for check in (_misfits_of_events, _misfits_of_items, _misfits_of_competing):
            yield from as_far_as_read(check(config, f"encoders.{name}", encoder, schema))


def _misfits_of_events(_: Config, path: str, encoder: Encoder, schema: Schema) -> Iterator[Mistake]:
    features = _features(schema)
    shapeless = [e for e in encoder.events if e in features and features[e].kind in ("ids", "vector")]
    if shapeless:
        yield f"{path}.events", f"{shapeless[0]} is of kind {features[shapeless[0]].kind}; expected id or float"
    if encoder.history in _histories(schema):
        events = schema.history(encoder.history).events
        yield from unknown_names(f"{path}.events", encoder.events, events, f"event of {encoder.history}")


def _misfits_of_items(config: Config, path: str, encoder: Encoder, schema: Schema) -> Iterator[Mistake]:
    yield from unknown_names(f"{path}.history", [encoder.history], _histories(schema), "history")
    items = [feature.name for feature in schema.features if feature.level == "item"]
    yield from unknown_names(f"{path}.features", encoder.features, items, "item feature")
    if isinstance(encoder.by, SelfAttention):
        width = sum(_width(config, _features(schema), name) for name in encoder.features)
        if width % encoder.by.heads:
            yield f"{path}.by.heads", f"{encoder.by.heads} heads do not divide the history's width {width}"


def _misfits_of_competing(_: Config, path: str, encoder: Encoder, schema: Schema) -> Iterator[Mistake]:
    named = encoder.competing and encoder.history in _histories(schema)
    if named and not schema.history(encoder.history).competitors:
        yield f"{path}.competing", f"the dataset logs no competitors of the events of {encoder.history}"


def _misfits_of_crosses(config: Config, schema: Schema) -> Iterator[Mistake]:
    ids = [f.name for f in schema.features if f.level == "item" and f.kind == "id"]
    for name, cross in config.cross.items():
        with suppress(UnreadError):
            yield from unknown_names(f"cross.{name}.history", [cross.history], _histories(schema), "history")
            yield from unknown_names(f"cross.{name}.feature", [cross.feature], ids, "item feature of one id")


def _misfits_of_heads(config: Config, schema: Schema) -> Iterator[Mistake]:
    for name, head in heads_of(config).items():
        path = f"heads.{name}"
        yield from as_far_as_read(_misfits_of_features(config, path, head, schema))
        yield from as_far_as_read(_crossed(config, path, head))
        yield from as_far_as_read(_gated_items(path, head, _features(schema)))


def _misfits_of_features(config: Config, path: str, head: Head, schema: Schema) -> Iterator[Mistake]:
    named = [feature.name for feature in schema.features if feature.level != "event"]
    known = [*named, *config.encoders, *config.cross]
    yield from unknown_names(f"{path}.features", head.features, known, "feature, encoder or cross feature")
    if {*head.features} <= {*known}:
        yield from as_far_as_read(_sides(f"{path}.features", config, head.features, _features(schema)))
        if isinstance(head, Retrieval) and head.trunk is None:
            yield from _bare_vectors(f"{path}.dim", config, head, _features(schema))


def _crossed(config: Config, path: str, head: Head) -> Iterator[Mistake]:
    crossed = [name for name in head.features if name in config.cross]
    crossed += [e for e in head.features if e in config.encoders and _sees_candidate(config.encoders[e])]
    if crossed and head is not config.heads.ranking:
        yield (
            f"{path}.features",
            f"{crossed[0]} is of a user and a candidate together; only the ranking head reads such features",
        )


def _gated_items(path: str, head: Head, features: Mapping[str, Feature]) -> Iterator[Mistake]:
    prior = head.gate.prior if isinstance(head, Retrieval) and head.gate is not None else ()
    of_items = [name for name in prior if name in features and features[name].level == "item"]
    if of_items:
        yield f"{path}.gate.prior", f"{of_items[0]} is of the item; the gate weighs the user side"


def _misfits_of_tables(config: Config, schema: Schema) -> Iterator[Mistake]:
    features = _features(schema)
    spaces = sorted({feature.space for feature in schema.features if feature.kind in ("id", "ids")})
    odd = [space for space in config.tables if space not in {feature.space for feature in schema.features}]
    for space in odd:
        yield f"tables.{space}", f"the dataset has no id space {space!r}{settings.near_miss(space, spaces)}"
    read = [name for head in heads_of(config).values() for name in head.features]
    read += [name for encoder in config.encoders.values() for name in (*encoder.features, *encoder.events)]
    used = {features[name].space for name in read if name in features and features[name].kind in ("id", "ids")}
    for space in sorted(used - {*config.tables} - {settings.nearest(space, spaces) for space in odd}):
        yield "tables", f"no table {space!r}, which features in use need"


def _features(schema: Schema) -> dict[str, Feature]:
    return {feature.name: feature for feature in schema.features}


def _histories(schema: Schema) -> list[str]:
    return [history.name for history in schema.histories]


def _misfits_of_evaluation(config: Config, schema: Schema) -> Iterator[Mistake]:
    values = [f.name for f in schema.features if f.level == "item" and f.kind == "id"]
    varied, explore = config.evaluation.variety, config.evaluation.explore
    yield from unknown_names("evaluation.variety", [varied], ["", *values], "item feature of one id")
    for field_, part in (("valid", config.evaluation.valid), ("test", config.evaluation.test)):
        if not schema.requests(part) and (field_ == "test" or config.train.evaluate_every_epochs):
            yield f"evaluation.{field_}", f"the dataset has no request in its {part} part"
    if explore is not None:
        yield from unknown_names("evaluation.explore.history", [explore.history], _histories(schema), "history")
        if explore.noise and not varied:
            yield "evaluation.explore.noise", "is stronger for narrow interests: evaluation.variety must say in what"


def _misfits_of_pools(config: Config, schema: Schema) -> Iterator[Mistake]:
    for name, pool in config.evaluation.pools.items():
        with suppress(UnreadError):
            yield from unknown_names(f"evaluation.pools.{name}.pool", [pool.pool], ["", *schema.pools], "pool")


def _misfits_of_views(config: Config, schema: Schema) -> Iterator[Mistake]:
    retrieval = config.heads.retrieval
    of_items = {feature.name for feature in schema.features if feature.level == "item"}
    read = of_items & {*retrieval.features} if retrieval is not None else of_items
    for name, objective in config.objectives.items():
        with suppress(UnreadError):
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
    user, item = (sum(_width(config, features, name) for name in names) for names in (of_user, of_item))
    if not user == item == head.dim:
        yield path, f"is {head.dim}; without a trunk it is the width of user and item, which are {user} and {item}"


def _width(config: Config, features: Mapping[str, Feature], name: str) -> int:
    """The columns of a feature; `UNREAD` where itself or its table is a mistake of its own."""
    feature = features.get(name, UNREAD)
    if feature.kind in ("float", "vector"):
        return feature.size or 1
    return config.tables[feature.space].dim if feature.space in config.tables else UNREAD


def _sees_candidate(encoder: Encoder) -> bool:
    return isinstance(encoder.by, TargetAttention)
