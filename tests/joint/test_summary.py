"""Tables in print: what fits stays as it is, what is too wide goes on below."""

from types import SimpleNamespace

from joint.summary import WIDTH, aligned, alignment_table, folded


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


def test_what_is_known_of_how_near_students_are_to_the_teacher():
    tasks = {f"task_{n}": None for n in range(6)}
    measured = SimpleNamespace(k=(10, 5), quotas={"retrieval": 40, "pre_ranking": 20})
    config = SimpleNamespace(tasks=tasks, evaluation=measured)
    found = {f"alignment/reverse_rate/{task}": 0.25 for task in ("fused", *tasks)}
    found |= {f"pre_ranking/calibration/{task}": 1.5 for task in tasks} | {"alignment/nktd@40/pre_ranking": 0.125}
    found |= {"alignment/teacher/overlap@5/pre_ranking/unexposed": 0.75, "alignment/teacher/overlap@10/pre_ranking": 1}
    lines = alignment_table(config, found).splitlines()
    assert max(map(len, lines)) <= WIDTH
    words = [word for line in lines for word in line.split()]
    assert words.count("0.2500") == 7
    assert words.count("1.5000") == 6
    assert {"nktd@40", "overlap@5/unexposed", "calibration/task_5", "0.1250", "0.7500"} <= {*words}
    assert not {"overlap@5", "overlap@10", "inconsistency", "retrieval"} & {*words}
    assert alignment_table(config, {"ranking/auc/task_0": 0.5}) == ""
