"""Tables in print: what fits stays as it is, what is too wide goes on below."""

from joint.summary import WIDTH, aligned, folded


def test_a_table_that_fits_is_one():
    rows = [["", "a", "bb"], ["one", "1", "-"], ["three", "-", "-"]]
    assert folded(rows) == aligned(rows) == ["       a  bb", "-" * 12, "one    1   -", "three  -   -"]
    assert folded([["", "a"]]) == ["  a", "---"]


def test_a_wide_table_goes_on_below_without_rows_that_have_nothing_there():
    heading = ["", *(f"auc/task_{n:02}" for n in range(20))]
    rows = [heading, ["ranking", *["0.5000"] * 20], ["funnel", "0.1000", *["-"] * 19]]
    lines = folded(rows)
    assert max(map(len, lines)) <= WIDTH
    assert [word for line in lines if "auc" in line for word in line.split()] == heading[1:]
    assert sum(line.startswith("ranking") for line in lines) == lines.count("") + 1 > 1
    assert sum(line.startswith("funnel") for line in lines) == 1
