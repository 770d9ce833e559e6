"""Reading: YAML mistakes, the base chain, overrides, and the place of every value."""

import re
from pathlib import Path

import pytest

from joint.configuring.settings import Tree, near_miss, place, plain, raise_at, read
from joint.errors import ConfigError


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def tree_of(text: str, *overrides: str, name: str = "c.yaml") -> Tree:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text)
    return read(name, overrides)


def test_base_chain_file_and_overrides_merge() -> None:
    tree_of("name: low\nseed: 1\nadam: {lr: 0.5, clip: 9}\nnull: {kept: {deep: true}}", name="low/a.yaml")
    tree_of("base: low/a.yaml\nname: middle\nadam: {lr: 1e-3}", name="b.yaml")
    overrides = ["seed=2", "seed=3", "adam.betas=[0.5, 0.5]"]
    tree = tree_of("base: ../b.yaml\nname: top", *overrides, name="sub/c.yaml")
    assert plain(tree) == {
        "name": "top",
        "seed": 3,
        "adam": {"lr": 0.001, "clip": 9, "betas": [0.5, 0.5]},
        "null": {"kept": {"deep": True}},
    }
    assert place(tree, "name") == "sub/c.yaml:2"
    assert place(tree, "adam.lr") == "b.yaml:3"
    assert place(tree, "adam.clip") == "low/a.yaml:3"
    assert place(tree, "null.kept.deep") == "low/a.yaml:4"
    assert place(tree, "seed") == "seed=3 (command line)"


def test_lists_and_scalars_replace_and_null_stays_as_a_mark() -> None:
    tree_of("a: [1, 2]\nb: {x: 1}\nc: 1\nd: {x: 1}", name="low.yaml")
    tree_of("base: low.yaml\na: [3]\nb: 2\nc: {x: 1}\nd: null", name="middle.yaml")
    assert plain(read("middle.yaml")) == {"a": [3], "b": 2, "c": {"x": 1}, "d": None}
    assert plain(read("middle.yaml", ["d={y: 2}"])) == {"a": [3], "b": 2, "c": {"x": 1}, "d": {"y": 2}}


def test_overrides_are_yaml_after_the_first_equals_sign() -> None:
    tree = tree_of("a: 1", "a=b=c", "d={e: {f: [1, x]}}", "g.h=1e-4", "i=", "j='2'", "k=1_000")
    expected = {"a": "b=c", "d": {"e": {"f": [1, "x"]}}, "g": {"h": 0.0001}, "i": None, "j": "2", "k": 1000}
    assert plain(tree) == expected


def test_anchors_and_merge_keys() -> None:
    tree = tree_of("base: null\na: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: *a")
    assert plain(tree) == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": {"x": 1, "y": 2}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "name: a\nseed: 1\nname: b\nx: {y: 1, y: 2}",
            "c.yaml:3: name: given twice\nc.yaml:4: y: given twice",
        ),
        ("name: a\nadam: {lr: 1", "c.yaml:2: not YAML: expected ',' or '}', but got '<stream end>'"),
        ("name: a\n\tseed: 1", "c.yaml:2: not YAML: "),
        ("- a", "c.yaml:1: expected a mapping, found a list"),
        ("just words", "c.yaml:1: expected a mapping, found 'just words'"),
        ("? [a]\n: 1", "c.yaml:1: not YAML: a key must be a scalar"),
        ("a: 1\nb: 0x_", "c.yaml:1: not YAML: invalid literal for int()"),
        ("a: &a [*a]", "c.yaml:1: not YAML: found unconstructable recursive node"),
        ("a: !!python/object:os.system {}", "c.yaml:1: not YAML: could not determine a constructor"),
        ("name: a\nbase: [x]", "c.yaml:2: base: . is not a file"),
        ("name: a\nbase: no.yaml", "c.yaml:2: base: no.yaml is not a file"),
        ("base: ./c.yaml", "c.yaml:1: base: c.yaml is its own base"),
    ],
)
def test_mistakes_in_files(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        tree_of(text)
    assert str(caught.value).count("\n") == message.count("\n")


def test_a_circle_of_bases_is_named() -> None:
    Path("a.yaml").write_text("base: b.yaml")
    Path("b.yaml").write_text("x: 1\nbase: a.yaml")
    with pytest.raises(ConfigError, match=r"^b\.yaml:2: base: a\.yaml is its own base$"):
        read("a.yaml")


def test_a_missing_or_binary_file() -> None:
    with pytest.raises(ConfigError, match=r"^none\.yaml: cannot be read: No such file or directory$"):
        read("none.yaml")
    Path("c.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ConfigError, match=r"^c\.yaml: cannot be read: 'utf-8' codec"):
        read("c.yaml")


def test_an_empty_file_is_an_empty_mapping() -> None:
    assert plain(tree_of("# nothing\n", "name=a")) == {"name": "a"}


def test_malformed_overrides_are_all_named() -> None:
    with pytest.raises(ConfigError) as caught:
        tree_of("name: a", "--seed", "a..b=1", "=1", "x={")
    assert [line.split(" (command line): ") for line in str(caught.value).splitlines()] == [
        ["--seed", "expected key=value, with dots between nested keys"],
        ["a..b=1", "expected key=value, with dots between nested keys"],
        ["=1", "expected key=value, with dots between nested keys"],
        ["x={", "not YAML: expected the node content, but found '<stream end>'"],
    ]


def test_place_is_that_of_the_deepest_node_that_exists() -> None:
    tree = tree_of("a:\n  b:\n    - 1\n    - 2\nc: 3", "a.d.e=5", "a.x=6")
    places = {path: place(tree, path) for path in ("", "z", "a", "a.b", "a.b.1", "a.b.7", "a.b.q", "c.d", "a.d")}
    assert places == {
        "": "c.yaml:1",
        "z": "c.yaml:1",
        "a": "c.yaml:1",  # the mapping was written here; the override only added to it
        "a.b": "c.yaml:2",
        "a.b.1": "c.yaml:4",
        "a.b.7": "c.yaml:2",
        "a.b.q": "c.yaml:2",
        "c.d": "c.yaml:5",
        "a.d": "a.d.e=5 (command line)",
    }


def test_raise_at_orders_problems_by_their_place() -> None:
    tree = tree_of("a: 1\nb:\n  c: 2", "d=3")
    raise_at(tree, [])
    with pytest.raises(ConfigError) as caught:
        raise_at(tree, [("d", "third"), ("b.c.x", "second"), ("", "of the whole"), ("a", "first")])
    assert str(caught.value).splitlines() == [
        "c.yaml:1: of the whole",
        "c.yaml:1: a: first",
        "c.yaml:3: b.c.x: second",
        "d=3 (command line): d: third",
    ]


def test_near_miss() -> None:
    assert near_miss("clck", ["click", "like"]) == "; did you mean click?"
    assert near_miss("xyz", ["click", "like"]) == "; known: click, like"
    assert near_miss("xyz", []) == ""
