"""Reading an experiment, and the checks that need more than one of its sections.

`python -m joint.config FILE [key=value ...]` prints the resolved config, or every mistake in it.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from torch import nn

from joint.commands import run_command
from joint.configuring import settings
from joint.configuring.unread import UnreadError, as_far_as_read
from joint.errors import ConfigError
from joint.experiment import ALSO_CALLED, HEADS, Config, heads_of
from joint.objectives import (
    AdaptiveContrastive,
    Distillation,
    ExpectedL0,
    Imitation,
    ItemViews,
    MultiClass,
    Objective,
    Pairwise,
    ResidualLoss,
    spaces_of,
)
from joint.schema import POOL_TOKENS, SPACE_TOKENS, STAGES
from towers.mixtures import Snr
from towers.pre_ranking import PreRanking
from towers.ranking import Ranking
from towers.residual import Residual
from towers.retrieval import Retrieval
from towers.sequence import SelfAttention


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Config, settings.Tree]:
    """Read and check an experiment; the tree remembers where each value was written, for later checks.

    Raises:
        ConfigError: one line per mistake, all of them.
    """
    tree = read_experiment(path, overrides)
    return config_of(tree), tree


def read_experiment(path: str | Path, overrides: Sequence[str] = ()) -> settings.Tree:
    """`settings.read`; ConfigError if the file is an ablation of an experiment."""
    tree = settings.read(path, overrides)
    if isinstance(tree.value, dict) and "variants" in tree.value:
        raise ConfigError(f"{path} is an ablation: python -m joint.compare {path}")
    return tree


def config_of(tree: settings.Tree) -> Config:
    """The experiment that a tree of settings is.

    Raises:
        ConfigError: one line per mistake, all of them.
    """
    config, problems = settings.attempt(tree, Config, also_called=ALSO_CALLED)
    settings.raise_all([*problems, *settings.at(tree, mistakes(config))])
    return config


Mistake = tuple[str, str]
Head = Retrieval | PreRanking | Ranking


def unknown_names(path: str, names: Iterable[str], known: Iterable[str], what: str) -> Iterator[Mistake]:
    """A mistake at `path` for each of `names`, as far as read, that is no `known` name of a `what`."""
    with suppress(UnreadError):
        known = list(known)
        for name in names:
            if name not in known:
                yield path, f"no {what} {name!r}{settings.near_miss(name, known)}"


def mistakes(config: Config) -> Iterator[Mistake]:
    """What makes no sense in a config, whatever the dataset: (dotted path, message).

    Every check sees to one thing, so that a value that could not be read hides nothing but what is about it.
    """
    checks = (
        *(_no_objective, _no_head, _evaluated_task, _evaluated_heads, _split_mistakes, _quota_mistakes),
        *(_pool_mistakes, _candidate_mistakes, _name_mistakes),
        *(_sharing_mistakes, _layers_mistakes, _residual_mistakes, _softmax_mistakes, _views_twice),
        *(_head_mistakes, _all_objective_mistakes),
    )
    for check in checks:
        yield from as_far_as_read(check(config))


def _no_objective(config: Config) -> Iterator[Mistake]:
    if not config.objectives:
        yield "objectives", "none; expected at least one"


def _no_head(config: Config) -> Iterator[Mistake]:
    if not heads_of(config):
        yield "heads", "no head; expected at least one of retrieval, pre_ranking, ranking"


def _evaluated_task(config: Config) -> Iterator[Mistake]:
    yield from unknown_names("evaluation.task", [config.evaluation.task], config.tasks, "task")


def _evaluated_heads(config: Config) -> Iterator[Mistake]:
    yield from unknown_names("evaluation.whole_catalogue", config.evaluation.whole_catalogue, heads_of(config), "head")


def _split_mistakes(config: Config) -> Iterator[Mistake]:
    if config.evaluation.test in config.data.train or len(set(config.data.train)) < len(config.data.train):
        yield "data.train", f"names {config.evaluation.test}, which evaluation.test measures on, or a part twice"
    if config.evaluation.valid in config.data.train and config.train.evaluate_every_epochs:
        part = config.evaluation.valid
        yield (
            "train.evaluate_every_epochs",
            f"{part} is trained on, so it validates nothing; set 0 or change data.train",
        )


def _quota_mistakes(config: Config) -> Iterator[Mistake]:
    heads, quotas = heads_of(config), config.evaluation.quotas
    first = "retrieval" if "retrieval" in heads else ""  # without it the funnel is over the logged candidates
    if not {*quotas} <= {*heads}:
        yield from unknown_names("evaluation.quotas", quotas, heads, "head")
    elif quotas and list(quotas) != [head for head in HEADS if head in quotas or head == first]:
        yield "evaluation.quotas", f"expected in the funnel's order, from retrieval on; found {', '.join(quotas)}"
    elif list(quotas.values()) != sorted(quotas.values(), reverse=True):
        yield "evaluation.quotas", "a head cannot keep more than the one before it left"


def _pool_mistakes(config: Config) -> Iterator[Mistake]:
    if config.evaluation.pools and config.heads.retrieval is None:
        yield "evaluation.pools", "are of the retrieval head, which is not there"
    kept = config.evaluation.quotas.get("retrieval", 0)
    reserved = sum(pool.quota for pool in config.evaluation.pools.values())
    if reserved > kept:
        yield "evaluation.pools", f"reserves {reserved} places; evaluation.quotas gives retrieval {kept}"


def _candidate_mistakes(config: Config) -> Iterator[Mistake]:
    yield from unknown_names("data.candidates", config.data.candidates, STAGES, "stage")
    if config.data.candidates.get("random") == "all":
        yield "data.candidates.random", "expected a number of draws, found 'all'"


def _name_mistakes(config: Config) -> Iterator[Mistake]:
    for section in ("tasks", "encoders", "cross", "objectives"):
        with suppress(UnreadError):
            for name in getattr(config, section):
                if not re.fullmatch(r"[A-Za-z_][\w-]*", name) or hasattr(nn.ModuleDict, name):
                    yield section, f"{name!r} cannot be a name; choose a word of letters, digits, _ and -"


def _softmax_mistakes(config: Config) -> Iterator[Mistake]:
    pooled = [o for o in config.objectives.values() if isinstance(o, MultiClass | ItemViews)]
    if len({tuple(o.space) == ("corpus",) for o in pooled}) > 1:
        yield "objectives", "some are over the corpus and some over a sample of it; expected one pool in a run"


def _views_twice(config: Config) -> Iterator[Mistake]:
    if sum(isinstance(o, ItemViews) for o in config.objectives.values()) > 1:
        yield "objectives", "names item_views twice; expected one"


def _head_mistakes(config: Config) -> Iterator[Mistake]:
    for name, head in heads_of(config).items():
        for check in (_fusion_mistakes, _prior_mistakes, _feature_mistakes):
            yield from as_far_as_read(check(config, f"heads.{name}", head))


def _fusion_mistakes(config: Config, path: str, head: Head) -> Iterator[Mistake]:
    yield from unknown_names(f"{path}.fusion", head.fusion, config.tasks, "task")
    if not isinstance(head, Retrieval):
        yield from unknown_names(f"{path}.fusion_of", head.fusion_of, config.tasks, "task")
    for group, weights in head.fusion_by_group.items():
        yield from unknown_names(f"{path}.fusion_by_group.{group}", weights, config.tasks, "task")


def _prior_mistakes(_: Config, path: str, head: Head) -> Iterator[Mistake]:
    gates = {"gate": head.gate} | ({"task_gate": head.task_gate} if isinstance(head, Ranking) else {})
    for field_, gate in gates.items():
        if gate is not None:
            yield from unknown_names(f"{path}.{field_}.prior", gate.prior, head.features, "feature of this head")


def _feature_mistakes(_: Config, path: str, head: Head) -> Iterator[Mistake]:
    twice = sorted({feature for feature in head.features if head.features.count(feature) > 1})
    if twice:
        yield f"{path}.features", f"names {', '.join(twice)} twice"


def _residual(config: Config) -> Residual | None:
    return config.heads.ranking.residual if config.heads.ranking else None


def _residual_mistakes(config: Config) -> Iterator[Mistake]:
    ranking, residual = config.heads.ranking, _residual(config)
    if ranking is not None and residual is not None:
        path = "heads.ranking.residual"
        yield from unknown_names(f"{path}.features", residual.features, ranking.features, "feature of this head")
        if not any(isinstance(objective, ResidualLoss) for objective in config.objectives.values()):
            yield path, "no objective trains it; expected one of loss residual"


def _sharing_mistakes(config: Config) -> Iterator[Mistake]:
    heads, spared = heads_of(config), config.sharing.stop_gradient
    path = "sharing.stop_gradient"
    yield from unknown_names(path, spared, heads, "head")
    if heads and set(spared) >= set(heads):
        yield path, "names every head; nothing would train the tables"
    if config.sharing.mode == "tables_and_encoders":
        for name in config.encoders:
            readers = {head for head, settings_ in heads.items() if name in settings_.features}
            if len(readers) > 1 and readers <= set(spared):  # what one head reads is its own
                yield path, f"only {' and '.join(sorted(readers))} read encoder {name}; nothing would train it"


def _layers_mistakes(config: Config) -> Iterator[Mistake]:
    """A dense optimizer needs something to optimize."""
    head = config.heads.retrieval
    if head is None or len(heads_of(config)) > 1 or head.trunk is not None or head.bias:
        return
    read = [config.encoders[name] for name in head.features if name in config.encoders]
    if not any(isinstance(e.by, SelfAttention) or e.events or e.competing for e in read):
        yield "heads.retrieval.trunk", "null, and no encoder with layers: nothing but tables would be trained"


def _penalty_mistakes(config: Config, path: str, objective: ExpectedL0) -> Iterator[Mistake]:
    heads = heads_of(config)
    yield from unknown_names(f"{path}.head", [objective.head], heads, "head")
    if objective.head in heads and not isinstance(heads[objective.head].trunk, Snr):
        trunk = heads[objective.head].trunk
        found = f"is {trunk.kind}" if trunk else "is null"
        yield path, f"expected_l0 is of a trunk of kind snr; that of {objective.head} {found}"


def _views_mistakes(config: Config, path: str, objective: ItemViews) -> Iterator[Mistake]:
    if objective.head != "retrieval" or config.heads.retrieval is None:
        yield f"{path}.head", "views are of the retrieval head's item tower; expected that head"
    if objective.space not in (("corpus",), ("random",)):
        yield f"{path}.space", f"draws items uniformly; expected [corpus] or [random], found {[*objective.space]}"
    if objective.space == ("random",) and not config.data.shared_random:
        yield f"{path}.space", "random holds nothing: data.shared_random is 0"


POOLS = ({"corpus"}, {"in_batch"}, {"random"}, {"in_batch", "random"})


def _all_objective_mistakes(config: Config) -> Iterator[Mistake]:
    for name, objective in config.objectives.items():
        yield from as_far_as_read(_objective_mistakes(config, f"objectives.{name}", objective))


def _objective_mistakes(config: Config, path: str, objective: Objective) -> Iterator[Mistake]:
    if isinstance(objective, ExpectedL0):
        yield from _penalty_mistakes(config, path, objective)
        return
    if isinstance(objective, ItemViews):
        yield from _views_mistakes(config, path, objective)
        return
    checks = (_trained_head, _task_mistakes, _space_mistakes, _teacher_mistakes, _adaptive_mistakes, _trained_residual)
    for check in checks:
        yield from as_far_as_read(check(config, path, objective))


def _trained_head(config: Config, path: str, objective: Objective) -> Iterator[Mistake]:
    yield from unknown_names(f"{path}.head", [objective.head], heads_of(config), "head")


def _task_mistakes(config: Config, path: str, objective: Objective) -> Iterator[Mistake]:
    assert not isinstance(objective, ExpectedL0 | ItemViews)
    yield from unknown_names(f"{path}.tasks", objective.tasks, config.tasks, "task")
    if len(set(objective.tasks)) < len(objective.tasks):
        yield f"{path}.tasks", f"names a task twice: {', '.join(objective.tasks)}"


def _space_mistakes(config: Config, path: str, objective: Objective) -> Iterator[Mistake]:
    assert not isinstance(objective, ExpectedL0 | ItemViews)
    own = sorted({*objective.space})
    yield from unknown_names(f"{path}.space", own, SPACE_TOKENS, "space")
    others = {token for spaces in spaces_of(objective).values() for token in spaces} - {*own}
    yield from unknown_names(f"{path}.space", sorted(others), SPACE_TOKENS, "space")
    tokens = {*own, *others}
    if isinstance(objective, MultiClass):
        yield from _multi_class_mistakes(config, path, objective)
        return
    if pooled := sorted(tokens & set(POOL_TOKENS)):
        yield (
            f"{path}.space",
            f"{objective.loss} compares candidates of a request; {pooled[0]} is not among them",
        )
    if isinstance(objective, Imitation) and tokens & {"positive", "exposed_neg"}:
        yield f"{path}.space", f"{objective.loss} orders the same candidates for all tasks; name exposed instead"
    if isinstance(objective, Pairwise):
        yield from unknown_names(f"{path}.winner_weights", objective.winner_weights, SPACE_TOKENS, "space")
    if not {*config.data.candidates} <= {*STAGES}:
        return  # what is drawn is not known yet
    sampled = [STAGES[name] for name, quota in config.data.candidates.items() if quota]
    for token in sorted(tokens - set(POOL_TOKENS)):
        drawn = "exposed" if token in ("positive", "exposed_neg") else token
        flags = STAGES.get(drawn)
        if flags is not None and not any(stage & flags for stage in sampled):
            yield f"{path}.space", f"{token} holds nothing: data.candidates draws no {drawn}"


def _multi_class_mistakes(config: Config, path: str, objective: MultiClass) -> Iterator[Mistake]:
    if objective.head != "retrieval" or set(objective.space) not in POOLS:
        yield path, "multi_class trains the retrieval head over space [corpus], [in_batch], [random] or both of these"
    if objective.hard and tuple(objective.space) != ("corpus",):
        yield f"{path}.hard", "is a window of ranks in the corpus; expected space [corpus]"
    if "random" in objective.space and not config.data.shared_random:
        yield f"{path}.space", "random holds nothing: data.shared_random is 0"


def _adaptive_mistakes(_: Config, path: str, objective: Objective) -> Iterator[Mistake]:
    if isinstance(objective, AdaptiveContrastive):
        if objective.head != "pre_ranking":
            said = "adaptive weights compare the pre_ranking head's gated item side; no other head has one"
            yield f"{path}.head", said
        if objective.shuffle and {*objective.space} & {"positive", "exposed_neg"}:
            said = "deals the weights of all tasks alike; name spaces that are the same for all tasks"
            yield f"{path}.shuffle", said


def _trained_residual(config: Config, path: str, objective: Objective) -> Iterator[Mistake]:
    if isinstance(objective, ResidualLoss) and (objective.head != "ranking" or not _residual(config)):
        yield f"{path}.head", "trains the residual of the ranking head; heads.ranking.residual is not there"


def _teacher_mistakes(config: Config, path: str, objective: Objective) -> Iterator[Mistake]:
    if not isinstance(objective, Distillation | Imitation):
        return
    if objective.teacher == "logged":
        yield from _logged_mistakes(config, path, objective)
        return
    yield from unknown_names(f"{path}.teacher", [objective.teacher], heads_of(config), "head")
    if objective.teacher == objective.head:
        yield f"{path}.teacher", "a head cannot teach itself"


def _logged_mistakes(config: Config, path: str, objective: Distillation | Imitation) -> Iterator[Mistake]:
    for task in objective.tasks or config.tasks:
        if task in config.tasks and not config.tasks[task].score:
            yield f"tasks.{task}", f"score: missing; expected the column that teaches it ({path}.teacher is logged)"
    if {*objective.space} <= {"random", "matching_ns"}:
        yield f"{path}.space", "holds sampled candidates only, which no logged teacher has scored"


def main() -> int:
    """Print the resolved config; returns the exit code."""
    parser = argparse.ArgumentParser(prog="joint.config", description="Print a config as resolved, or its mistakes.")
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    arguments = parser.parse_args()
    config, _ = load_config(arguments.config, arguments.overrides)
    print(settings.dump(config), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
