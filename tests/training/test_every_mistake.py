"""One mistake is one line, wherever it is in a config: nothing is hidden behind it, nothing follows from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from joint.config import config_of
from joint.configuring.sources import Place, Tree
from joint.errors import ConfigError
from joint.experiment import ALSO_CALLED
from joint.fit import load_fitting

PLACE = Place(0, 1, "c.yaml:1")
Key = tuple[str, ...]


def keys(value: Any, path: Key = ()) -> Iterator[Key]:
    """The keys of all values, sections too."""
    if path:
        yield path
    for key, child in value.items() if isinstance(value, dict) else ():
        yield from keys(child, (*path, key))


def lines_of(file: Path, overrides: Sequence[str] = ()) -> list[str]:
    try:
        load_fitting(file, overrides)
    except ConfigError as error:
        return str(error).splitlines()
    return []


def changed(config: dict[str, Any], key: Key, file: Path, *, name: str | None = None, value: Any = None) -> list[str]:
    """What is said of a config with another value, or another name, for one of its keys."""
    again = deepcopy(config)
    section = again
    for part in key[:-1]:
        section = section[part]
    if name is None:
        section[key[-1]] = value
    else:
        items = [(name if part == key[-1] else part, child) for part, child in section.items()]
        section.clear()
        section.update(items)
    file.write_text(yaml.safe_dump(again, sort_keys=False))
    return lines_of(file)


@pytest.fixture
def tiny(tiny_file) -> dict[str, Any]:
    return yaml.safe_load(tiny_file.read_text())


NAMES = (
    "tasks",
    "tables",
    "encoders",
    "objectives",
    "candidates",
    "fusion",
    "quotas",
)  # sections of names of one's own


OTHERS = {  # a mistake, and the sections without which it cannot be judged
    "evaluation.task": ("lik", ["tasks", "evaluation"]),
    "objectives.student.space": (["exposd"], ["objectives.student.loss"]),
    "heads.pre_ranking.features": (["user_id", "titel"], ["data.path", "encoders"]),
}


def test_a_value_that_cannot_be_read_is_one_line_wherever_it_is_and_hides_no_other(tiny, tmp_path):
    assert len([*keys(tiny)]) > 100
    for place, (value, _) in OTHERS.items():
        section, _, key = place.rpartition(".")
        inner = tiny
        for part in section.split("."):
            inner = inner[part]
        inner[key] = value
    for key in keys(tiny):
        where = ".".join(key)
        lines = changed(tiny, key, tmp_path / "c.yaml", value=[[{"no": 1}]])
        expected = {
            place
            for place, (_, needs) in OTHERS.items()
            if not any(f"{known}.".startswith(f"{where}.") for known in (place, *needs))
        }
        assert {line.split(": ")[1] for line in lines} >= expected, where
        assert len(lines) == 1 + len(expected), (where, lines)


def test_a_key_that_is_misspelt_is_one_line_wherever_it_is(tiny, tmp_path):
    ours = [key for key in keys(tiny) if len(key) == 1 or key[-2] not in NAMES]
    said = {key: changed(tiny, key, tmp_path / "c.yaml", name=f"{key[-1]}x") for key in ours}
    assert len(said) > 80
    assert {".".join(key): lines for key, lines in said.items() if len(lines) != 1} == {}
    for key, (line,) in said.items():
        tells_the_kind = key[-1] in ("kind", "loss")  # without it no other key of the section can be known
        assert ("missing; expected one of" if tells_the_kind else f"unknown key; did you mean {key[-1]}?") in line


def test_a_required_key_that_is_missing_is_one_line(tiny, tmp_path):
    for key in (
        ("data", "path"),
        ("heads", "retrieval", "features"),
        ("tables", "item_id", "dim"),
        ("tasks", "fine", "label"),
    ):
        (line,) = changed(tiny, key, tmp_path / "c.yaml", value=None)
        assert f": {'.'.join(key)}: missing; expected " in line


@pytest.mark.parametrize(
    ("mistakes", "said"),
    [
        # A wrong type, a name that the dataset lacks, and a misspelt key of a head that objectives need.
        (
            {"train.log_every": "ten", "tasks.like.label": "ratting", "heads.pre_ranking.dimm": 8},
            [
                "heads.pre_ranking.dimm: unknown key; did you mean dim?",
                "tasks.like.label: no label 'ratting'; did you mean rating?",
                "train.log_every: expected an integer, found 'ten'",
            ],
        ),
        # Two that their sections refuse, and one of the config as a whole.
        (
            {"data.epochs": 0, "optimizer.dense.lr": -1, "evaluation.task": "lik"},
            [
                "data.epochs: must be at least 1, found 0",
                "evaluation.task: no task 'lik'; did you mean like?",
                "optimizer.dense.lr: must be at least 0, found -1.0",
            ],
        ),
        # 20 requests are no multiple of the 8 shards that there are by default; these are not what was meant.
        (
            {"data.shards": "two", "data.requests_per_batch": 20, "data.epochs": 0},
            ["data.epochs: must be at least 1, found 0", "data.shards: expected an integer, found 'two'"],
        ),
        # A block whose loss is unknown, another one's space, and a table.
        (
            {
                "objectives.retrieve.loss": "multi_clas",
                "objectives.student.space": ["exposd"],
                "tables.itemid": {"dim": 8},
            },
            [
                "objectives.retrieve.loss: 'multi_clas' is not one of",
                "objectives.student.space: no space 'exposd'; did you mean exposed?",
                "tables.itemid: the dataset has no id space 'itemid'; did you mean item_id?",
            ],
        ),
    ],
)
def test_unrelated_mistakes_are_all_said_and_nothing_else(tiny_file, mistakes, said):
    overrides = [
        f"{key}={yaml.safe_dump(value, default_flow_style=True).splitlines()[0]}" for key, value in mistakes.items()
    ]
    lines = sorted(line.split(" (command line): ", 1)[1] for line in lines_of(tiny_file, overrides))
    assert len(lines) == len(said)
    assert all(line.startswith(start) for line, start in zip(lines, said, strict=True)), lines


def test_a_list_with_an_item_that_cannot_be_read_is_one_line(tiny_file):
    (line,) = lines_of(tiny_file, ["data.days=[[1], 2024-01-01]"])
    assert line.endswith(": data.days.0: expected a string, found a list")


def test_each_has_its_file_line_key_and_near_miss(tiny_file):
    wrong = {
        "log_every: 1": "log_evry: 1",
        "label: rating, at_least: 3": "label: ratingg, at_least: 3",
        "epochs: 2": "epochs: x",
    }
    text = tiny_file.read_text()
    for right, other in wrong.items():
        text = text.replace(right, other)
    tiny_file.write_text(text)
    at = {
        other: number for number, line in enumerate(text.splitlines(), 1) for other in wrong.values() if other in line
    }
    epochs, label, log_every = (f"{tiny_file}:{line}: " for line in sorted(at.values()))
    assert lines_of(tiny_file) == [
        epochs + "data.epochs: expected an integer, found 'x'",
        label + "tasks.fine.label: no label 'ratingg'; did you mean rating?",
        log_every + "train.log_evry: unknown key; did you mean log_every?",
    ]


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("batch_size", "data.requests_per_batch"),
        ("data.batch_size", "data.requests_per_batch"),
        ("train.batch_size", "data.requests_per_batch"),
        ("train.requests_per_batch", "data.requests_per_batch"),
        ("epochs", "data.epochs"),
        ("train.num_epochs", "data.epochs"),
        ("seed", "run.seed"),
        ("train.seed", "run.seed"),
        ("dataset", "data.path"),
        ("path", "data.path"),
        ("num_workers", "train.threads"),
        ("lr", "optimizer.tables.lr or optimizer.dense.lr"),
        ("train.learning_rate", "optimizer.tables.lr or optimizer.dense.lr"),
        ("optimizer.dense.learning_rate", "optimizer.dense.lr"),
        ("train.weight_decay", "optimizer.dense.weight_decay"),
        ("encoders.rated_sequence.heads", "encoders.rated_sequence.by.heads"),
        ("heads.ranking.experts", "heads.ranking.trunk.experts"),
    ],
)
def test_a_key_of_another_section_or_trainer_is_pointed_to_by_its_full_path(tiny_file, key, meant):
    (line,) = lines_of(tiny_file, [f"{key}=3"])
    assert line == f"{key}=3 (command line): {key}: unknown key; did you mean {meant}?"


def test_a_required_key_in_the_wrong_section_is_not_missing_too(tiny_file):
    (line,) = lines_of(tiny_file, ["data.path=null", "dataset=somewhere"])
    assert line == "dataset=somewhere (command line): dataset: unknown key; did you mean data.path?"


def test_what_other_trainers_say_leads_to_keys_that_there_are():
    for key, meant in ALSO_CALLED.items():
        with pytest.raises(ConfigError, match=rf"{key}: unknown key; did you mean [\w.]*{meant}"):
            config_of(Tree({key: Tree(1, PLACE)}, PLACE))
