"""Reading an experiment, and the checks that need more than one of its sections.

`python -m joint.config FILE [key=value ...]` prints the resolved config, or every mistake in it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from joint import settings
from joint.commands import run_command
from joint.experiment import HEADS, Config, Encoder, heads_of
from joint.objectives import (
    AdaptiveContrastive,
    Distillation,
    ExpectedL0,
    Imitation,
    MultiClass,
    Objective,
    Pairwise,
    spaces_of,
)
from joint.schema import POOL_TOKENS, SPACE_TOKENS, STAGES, Feature, Schema
from towers.mixtures import Snr
from towers.pre_ranking import PreRanking
from towers.ranking import Ranking
from towers.retrieval import Retrieval
from towers.sequence import SelfAttention, TargetAttention


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
    yield from _sharing_mistakes(config)
    for name, head in heads.items():
        yield from _unknown(f"heads.{name}.fusion", list(head.fusion), list(config.tasks), "task")
        if not isinstance(head, Retrieval):
            yield from _unknown(f"heads.{name}.fusion_of", list(head.fusion_of), list(config.tasks), "task")
        yield from _prior_mistakes(name, head)
    for name, objective in config.objectives.items():
        yield from _objective_mistakes(config, f"objectives.{name}", objective)


def _prior_mistakes(name: str, head: Retrieval | PreRanking | Ranking) -> Iterator[Mistake]:
    gates = {"gate": head.gate} | ({"task_gate": head.task_gate} if isinstance(head, Ranking) else {})
    for field_, gate in gates.items():
        if gate is not None:
            yield from _unknown(f"heads.{name}.{field_}.prior", gate.prior, head.features, "feature of this head")


def _sharing_mistakes(config: Config) -> Iterator[Mistake]:
    heads, spared = heads_of(config), config.sharing.stop_gradient
    path = "sharing.stop_gradient"
    yield from _unknown(path, spared, list(heads), "head")
    if heads and set(spared) >= set(heads):
        yield path, "names every head; nothing would train the tables"
    if config.sharing.mode == "tables_and_encoders":
        for name in config.encoders:
            readers = {head for head, settings_ in heads.items() if name in settings_.features}
            if readers and readers <= set(spared):
                yield path, f"only {', '.join(sorted(readers))} reads encoder {name}; nothing would train it"


def _penalty_mistakes(config: Config, path: str, objective: ExpectedL0) -> Iterator[Mistake]:
    heads = heads_of(config)
    yield from _unknown(f"{path}.head", [objective.head], list(heads), "head")
    if objective.head in heads and not isinstance(heads[objective.head].trunk, Snr):
        yield (
            path,
            f"expected_l0 is of a trunk of kind snr; that of {objective.head} is {heads[objective.head].trunk.kind}",
        )


def _objective_mistakes(config: Config, path: str, objective: Objective) -> Iterator[Mistake]:
    if isinstance(objective, ExpectedL0):
        yield from _penalty_mistakes(config, path, objective)
        return
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
    if isinstance(objective, Imitation) and tokens & {"positive", "exposed_neg"}:
        yield f"{path}.space", f"{objective.loss} orders the same candidates for all tasks; name exposed instead"
    if isinstance(objective, Pairwise):
        yield from _unknown(f"{path}.winner_weights", list(objective.winner_weights), SPACE_TOKENS, "space")
    if isinstance(objective, AdaptiveContrastive) and objective.head != "pre_ranking":
        yield f"{path}.head", "adaptive weights compare the pre_ranking head's gated item side; no other head has one"
    if isinstance(objective, Distillation | Imitation):
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
    yield from _unknown("data.pool", [config.data.pool], ["", *schema.pools], "pool")
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
        if encoder.competing and encoder.history in histories and not schema.history(encoder.history).competitors:
            yield f"{path}.competing", f"the dataset logs no competitors of the events of {encoder.history}"
        used |= {f: features[f] for f in (*encoder.features, *encoder.events) if f in features}
    for name, cross in config.cross.items():
        path = f"cross.{name}"
        yield from _unknown(f"{path}.history", [cross.history], histories, "history")
        ids = [f.name for f in schema.features if f.level == "item" and f.kind == "id"]
        yield from _unknown(f"{path}.feature", [cross.feature], ids, "item feature of one id")
        if name in features or name in config.encoders:
            yield path, f"{name} is a feature or an encoder already; choose another name"
    for name, head in heads_of(config).items():
        known = [*(f.name for f in schema.features if f.level != "event"), *config.encoders, *config.cross]
        yield from _unknown(f"heads.{name}.features", head.features, known, "feature, encoder or cross feature")
        used |= {f: features[f] for f in head.features if f in features}
        yield from _sides(f"heads.{name}.features", config, head.features, features)
        if isinstance(head, Retrieval) and head.gate is not None:
            of_items = [n for n in head.gate.prior if n in features and features[n].level == "item"]
            if of_items:
                yield f"heads.{name}.gate.prior", f"{of_items[0]} is of the item; the gate weighs the user side"
        crossed = [e for e in head.features if e in config.encoders and _sees_candidate(config.encoders[e])]
        crossed += [e for e in head.features if e in config.cross]
        if crossed and name != "ranking":
            yield (
                f"heads.{name}.features",
                f"{crossed[0]} is of a user and a candidate together; its values could not be cached",
            )
    spaces = {feature.space for feature in used.values() if feature.kind in ("id", "ids")}
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
