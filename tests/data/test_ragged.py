"""Ragged lists against plain Python, their way through Arrow, and the hash behind every draw."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from joint.data.ragged import Ragged, concatenate, draw, offsets_of, side_by_side
from joint.data.requests import Requests, _numpy_column, concatenate_requests, from_arrow, to_arrow

Lists = list[list[int]]


def ragged(lists: Lists) -> Ragged:
    flat = [value for values in lists for value in values]
    return Ragged(np.array(flat, np.int64), offsets_of(np.array([len(values) for values in lists], np.int64)))


def plain(lists: Ragged) -> Lists:
    return [lists.values[a:b].tolist() for a, b in zip(lists.offsets[:-1], lists.offsets[1:], strict=True)]


@pytest.fixture(params=[[], [[]], [[], [], []], [[7]], [[1, 2, 3], [], [4], [5, 6, 7, 8], []], [[], [9, 9], []]])
def lists(request: pytest.FixtureRequest) -> Lists:
    return request.param


def test_lengths_rows_and_truncation(lists: Lists) -> None:
    made = ragged(lists)
    assert plain(made) == lists
    assert len(made) == len(lists)
    assert made.lengths.tolist() == [len(values) for values in lists]
    assert made.rows.tolist() == [row for row, values in enumerate(lists) for _ in values]
    for length in range(6):
        assert plain(made.newest(length)) == [values[max(0, len(values) - length) :] for values in lists]


def test_take_in_any_order_and_again(lists: Lists) -> None:
    rng = np.random.default_rng(0)
    for rows in ([], rng.integers(0, len(lists), 9).tolist() if lists else []):
        assert plain(ragged(lists).take(np.array(rows, np.int64))) == [lists[row] for row in rows]


@pytest.mark.parametrize(("first", "last"), [(0, 0), (0, 2), (1, 3), (3, 3)])
def test_between_is_take_of_neighbours(first: int, last: int) -> None:
    ragged = Ragged(np.array([5, 6, 7, 8]), np.array([0, 2, 2, 4]))
    requests = Requests({"list": ragged, "number": np.array([1, 2, 3])})
    found, expected = requests.between(first, last), requests.take(np.arange(first, last))
    assert found.lists("list").values.tolist() == expected.lists("list").values.tolist()
    assert found.lists("list").offsets.tolist() == expected.lists("list").offsets.tolist()
    assert found.scalars("number").tolist() == expected.scalars("number").tolist()


def test_keep(lists: Lists) -> None:
    made = ragged(lists)
    for drop in (set(), {2, 5, 9}, set(range(10))):
        mask = np.array([value not in drop for value in made.values], bool)
        assert plain(made.keep(mask)) == [[v for v in values if v not in drop] for values in lists]


def test_slices_may_overlap_and_be_empty() -> None:
    made = ragged([[10, 11], [12, 13, 14]])
    starts, lengths = np.array([3, 0, 5, 0, 1]), np.array([2, 5, 0, 0, 1])
    assert plain(made.slices(starts, lengths)) == [[13, 14], [10, 11, 12, 13, 14], [], [], [11]]


def test_concatenate_and_side_by_side(lists: Lists) -> None:
    other = [[100 + row] * (row % 3) for row in range(len(lists))]
    assert plain(concatenate([ragged(lists), ragged(other), ragged([])])) == lists + other
    joined, index = side_by_side(ragged(lists), ragged(other))
    assert plain(joined) == [a + b for a, b in zip(lists, other, strict=True)]
    both = [value for values in lists + other for value in values]
    assert [both[i] for i in index] == joined.values.tolist()


def test_with_values_needs_as_many() -> None:
    with pytest.raises(AssertionError):
        ragged([[1, 2]]).with_values(np.zeros(3))


def arrow_table() -> pa.Table:
    floats = pa.array([[1.5, None], [], [None], [2.0, 3.0, 4.0]], pa.list_(pa.float32()))
    return pa.table({"id": [1, 2, 3, 4], "items": [[1], [], [2, 3], [4, 5]], "label": floats})


@pytest.mark.parametrize(("begin", "length"), [(0, 4), (1, 2), (2, 2), (1, 1), (3, 1), (4, 0), (0, 0)])
def test_slices_of_arrow_tables(begin: int, length: int) -> None:
    part = from_arrow(arrow_table().slice(begin, length))
    items = [[1], [], [2, 3], [4, 5]][begin : begin + length]
    label = [[1.5, np.nan], [], [np.nan], [2.0, 3.0, 4.0]][begin : begin + length]
    assert len(part) == length
    assert part.scalars("id").tolist() == [1, 2, 3, 4][begin : begin + length]
    assert plain(part.lists("items")) == items
    np.testing.assert_array_equal(
        part.lists("label").values, np.array([value for values in label for value in values], np.float32)
    )
    assert part.lists("label").lengths.tolist() == [len(values) for values in label]
    assert part.lists("items").offsets[0] == 0


def test_a_list_array_whose_offsets_do_not_start_at_0() -> None:
    array = pa.array([[1], [], [2, 3], [4, 5]]).slice(2, 2)
    assert array.offsets[0].as_py() == 1
    lists = _numpy_column(array)
    assert isinstance(lists, Ragged)
    assert (lists.values.tolist(), lists.offsets.tolist()) == ([2, 3, 4, 5], [0, 2, 4])


def test_chunks_of_slices_and_the_way_back() -> None:
    table = arrow_table()
    chunked = pa.concat_tables([table.slice(2, 2), table.slice(0, 3)])
    requests = from_arrow(chunked)
    assert to_arrow(requests).to_pylist() == chunked.to_pylist()
    taken = requests.take(np.array([4, 0]))
    assert to_arrow(taken).to_pylist() == [chunked.to_pylist()[i] for i in (4, 0)]
    assert to_arrow(concatenate_requests([taken, requests])).to_pylist() == [
        *to_arrow(taken).to_pylist(),
        *chunked.to_pylist(),
    ]


def test_scalar_and_list_columns_are_told_apart() -> None:
    requests = Requests({"a": np.arange(2), "b": ragged([[1], []])})
    with pytest.raises(AssertionError, match="b"):
        requests.scalars("b")
    with pytest.raises(AssertionError, match="a"):
        requests.lists("a")


def splitmix(keys: Sequence[int]) -> int:
    """The fold in plain integers."""
    state, top = 0x9E3779B97F4A7C15, 2**64
    for key in keys:
        state ^= key % top
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % top
        state = (state ^ state >> 27) * 0x94D049BB133111EB % top
        state = ((state ^ state >> 31) + 0x9E3779B97F4A7C15) % top
    return state


def test_draw_is_a_function_of_the_keys_alone() -> None:
    keys = np.array([0, 1, -1, 2**62, -(2**63)])
    drawn = draw(5, keys[:, None], np.arange(3))
    assert drawn.dtype == np.uint64
    assert drawn.tolist() == [[splitmix([5, int(key), place]) for place in range(3)] for key in keys]
    assert draw(5, keys[3], 2) == drawn[3, 2]
    assert draw(1, 2) != draw(2, 1)


@pytest.mark.parametrize("shift", [0, 8, 56])
def test_draws_are_uniform_and_do_not_follow_their_keys(shift: int) -> None:
    bits = (draw(0, np.arange(200)[:, None], np.arange(200)) >> np.uint64(shift)) & np.uint64(255)
    counts = np.bincount(bits.astype(np.int64).ravel(), minlength=256)
    assert stats.chisquare(counts).pvalue > 1e-3
    pairs = np.bincount((bits[:, 1:] // 16 * 16 + bits[:, :-1] // 16).astype(np.int64).ravel(), minlength=256)
    assert stats.chisquare(pairs).pvalue > 1e-3
