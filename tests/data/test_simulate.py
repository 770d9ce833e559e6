"""The log of a planted funnel: its bytes, stages, days and histories, each derived again from the files by loops."""

import argparse
from collections import defaultdict

import numpy as np
import pytest

from joint.commands import run_command
from joint.data.dataset import Dataset
from joint.data.planted.draw import START, draw_world
from joint.data.planted.incumbent import STAGES, Incumbent
from joint.data.planted.people import WATCHED, draw_visits, login_groups
from joint.data.planted.simulate import SIZES, WORLDS, add_arguments, parameters_of, prepare, simulate
from joint.data.requests import concatenate_requests
from joint.errors import ConfigError, DataError
from joint.schema import Stage

TINY = ["users=40", "items=260", "days=5", "requests=400", "history=12", "retrieved=100", "coarse=60", "sampled=6"]
TINY += ["view_base=-2", "competitors=3"]  # views enough to fill histories


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny log: its folder, its parameters."""
    out = tmp_path_factory.mktemp("simulate") / "tiny"
    parameters = parameters_of("biased", "small", TINY)
    simulate(out, parameters, seed=3)
    return out, parameters


@pytest.fixture(scope="module")
def log(tiny):
    """Its requests of all days, and its dataset."""
    dataset = Dataset(tiny[0])
    further = dataset.further_columns()
    days = [dataset.read(part, further=further) for part in dataset.schema.parts]
    return concatenate_requests(days), dataset


def flag(stages, stage):
    return (stages & int(stage)) != 0


def bytes_of(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_same_seed_same_bytes_whatever_the_chunks(tiny, tmp_path, chunk):
    simulate(tmp_path / "again", tiny[1], seed=3, chunk=chunk)
    assert bytes_of(tmp_path / "again") == bytes_of(tiny[0])


def test_another_seed_is_another_world(tiny, tmp_path):
    other = simulate(tmp_path / "other", tiny[1], seed=4)
    assert other.hash != Dataset(tiny[0]).schema.hash


def test_worlds_of_a_seed_differ_in_the_incumbent_alone():
    fair, misled = (draw_world(parameters_of(name, "small"), 0).truth.arrays for name in ("fair", "misled"))
    assert all(np.array_equal(fair[name], misled[name]) for name in fair)


def test_days_and_splits(log):
    requests, dataset = log
    parts = dataset.schema.parts
    assert [part.split for part in parts] == ["train"] * 3 + ["valid", "test"]
    assert [part.rows for part in parts] == [80] * 5
    assert np.array_equal(np.unique(requests.scalars("day")), START + np.arange(5))
    assert (np.diff(requests.scalars("timestamp")) > 0).all()
    assert (requests.scalars("timestamp") // 86_400 == requests.scalars("day")).all()


def test_feedback_is_known_on_exposures_and_nowhere_else(log, tiny):
    requests, dataset = log
    stages = requests.lists("stages")
    exposed = flag(stages.values, Stage.EXPOSED)
    assert (np.bincount(stages.rows, exposed) == tiny[1].exposed).all()
    for label in dataset.schema.labels:
        assert np.array_equal(~np.isnan(requests.lists(label).values), exposed)


def test_labels_agree_with_each_other(log):
    requests, dataset = log
    known = flag(requests.lists("stages").values, Stage.EXPOSED)
    view, like, minutes, ratio, dwm = (requests.lists(name).values[known] for name in dataset.schema.labels)
    items = requests.lists("candidates").values[known]
    assert set(np.unique(view)) == set(np.unique(like)) == {0, 1}
    assert (like <= view).all()
    assert ((minutes > 0) == (view > 0)).all()
    assert (dwm >= minutes).all()
    assert (dwm > minutes).any()
    length = np.load(dataset.directory / "truth/item.length.npy")
    np.testing.assert_allclose(ratio, minutes / length[items], rtol=1e-6)


def test_flags_follow_the_funnel(log, tiny):
    """Each candidate was cut by one stage or exposed; the two orders are those of what entered their stage."""
    requests, _ = log
    p = tiny[1]
    stages = requests.lists("stages").values
    order, reorder = requests.lists("rank_index").values, requests.lists("rerank_index").values
    cut = [flag(stages, s) for s in (Stage.PRERANK_NEG, Stage.COARSE_NEG, Stage.RANKED)]
    assert (np.sum(cut, axis=0) == 1).all()
    ranked, reranked, exposed = cut[2], flag(stages, Stage.RERANKED), flag(stages, Stage.EXPOSED)
    assert np.array_equal(ranked, order >= 0)
    assert np.array_equal(reranked, reorder >= 0)
    assert np.array_equal(reranked, (order >= 0) & (order < p.reranked))
    assert np.array_equal(flag(stages, Stage.RANK_NEG), order >= p.reranked)
    assert np.array_equal(flag(stages, Stage.RANK_POS), (order >= 0) & (order < 10))
    assert np.array_equal(flag(stages, Stage.RERANK_POS), (reorder >= 0) & (reorder < 10))
    assert np.array_equal(flag(stages, Stage.RERANK_NEG), reorder >= 10)
    assert np.array_equal(exposed, (reorder >= 0) & (reorder < p.exposed))
    assert not flag(stages, Stage.RANDOM).any()


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_training_days_log_samples_and_the_last_two_all(log, tiny, split):
    requests, p = log[1].read_split(split), tiny[1]
    stages = requests.lists("stages")
    sizes = [p.retrieved - p.coarse, p.coarse - p.ranked, p.ranked - p.reranked, p.reranked]
    if split == "train":
        sizes = [p.sampled] * 3 + [p.reranked]
    groups = (Stage.PRERANK_NEG, Stage.COARSE_NEG, Stage.RANK_NEG, Stage.RERANKED)
    for stage, size in zip(groups, sizes, strict=True):
        assert (np.bincount(stages.rows, flag(stages.values, stage)) == size).all(), stage
    assert (stages.lengths == sum(sizes)).all()


def test_a_stage_that_cuts_less_than_the_sample_is_logged_whole(tmp_path):
    parameters = parameters_of("fair", "small", ["coarse=118", "days=3", "requests=9"])
    simulate(tmp_path / "log", parameters, seed=0)
    stages = Dataset(tmp_path / "log").read_split("train").lists("stages")
    assert (np.bincount(stages.rows, flag(stages.values, Stage.PRERANK_NEG)) == 2).all()


def test_candidates_are_out_unseen_and_distinct(log):
    requests, dataset = log
    candidates = requests.lists("candidates")
    first_day = dataset.first_day[""]
    assert (first_day[candidates.values] <= requests.scalars("day")[candidates.rows]).all()
    assert (first_day > START).any()
    assert np.isin(candidates.values, np.flatnonzero(first_day > START)).any()  # later items do get shown
    pairs = set(zip(candidates.rows.tolist(), candidates.values.tolist(), strict=True))
    assert len(pairs) == len(candidates.values)
    watched = requests.lists("effective")
    assert not pairs & set(zip(watched.rows.tolist(), watched.values.tolist(), strict=True))


def test_histories_are_what_came_before(log, tiny):
    """Replays the log by user: each history is the newest of what that user did in strictly earlier requests."""
    requests, dataset = log
    kind = dataset.catalogue["upload_type"]
    past = defaultdict(list)
    for row in range(len(requests)):
        user, now = requests.scalars("user_id")[row], requests.scalars("timestamp")[row]
        one = requests.take(np.array([row]))
        for name in ("effective", "series", "movies", "liked"):
            columns = [one.lists(name), one.lists(f"{name}.watched"), one.lists(f"{name}.timestamp")]
            found = list(zip(*(column.values.tolist() for column in columns), strict=True))
            assert found == past[user, name][-tiny[1].history :]
            assert all(time < now for _, _, time in found)
        labels = [one.lists(name).values for name in ("candidates", "effective_view", "like", "watch_ratio")]
        for item, view, like, ratio in zip(*labels, strict=True):
            event = (int(item), 1 + sum(ratio >= edge for edge in WATCHED), int(now))
            marks = {"effective": view, "series": view * (kind[item] == 1), "movies": view * (kind[item] == 2)}
            for name, mark in (marks | {"liked": like}).items():
                if mark == 1:
                    past[user, name].append(event)
    lengths = [len(events) for (_, name), events in past.items() if name == "effective"]
    assert max(lengths) > tiny[1].history  # some histories are full


def test_competitors_are_the_first_of_ranking_in_the_requests_of_past_views(log, tiny):
    """Where the whole request was logged; of all views, the last two days' alone can be looked up."""
    requests, dataset = log
    assert [history.competitors for history in dataset.schema.histories] == [3, 0, 0, 0]
    best = {}
    for row in range(len(requests)):
        one = requests.take(np.array([row]))
        order = one.lists("rank_index").values
        first = one.lists("candidates").values[np.argsort(np.where(order < 0, 999, order), kind="stable")[:3]]
        if len(order) == tiny[1].retrieved:
            best[requests.scalars("user_id")[row], requests.scalars("timestamp")[row]] = first.tolist()
    looked_up = 0
    for row in range(len(requests)):
        one = requests.take(np.array([row]))
        rivals = one.lists("effective.competitors").values.reshape(-1, 3).tolist()
        times = one.lists("effective.timestamp").values
        for time, found in zip(times, rivals, strict=True):
            expected = best.get((requests.scalars("user_id")[row], time))
            looked_up += expected is not None
            assert expected in (None, found)
    assert looked_up > 20


def test_login_groups_are_fifths_by_training_days():
    p = parameters_of("fair", "small")
    visits = draw_visits(p, 0)
    group = login_groups(p, visits)
    days = [
        len({d for u, d in zip(visits.user, visits.day, strict=True) if u == user and d < 10}) for user in range(300)
    ]
    assert (np.bincount(group) == 60).all()
    means = [np.mean(np.array(days)[group == g]) for g in range(5)]
    assert np.all(np.diff(means) > 0)
    assert max(np.array(days)[group == 0]) <= min(np.array(days)[group == 1])


def test_turns_of_a_day_count_a_users_requests():
    visits = draw_visits(parameters_of("fair", "small"), 1)
    seen = defaultdict(int)
    for user, day, nth in zip(visits.user, visits.day, visits.nth, strict=True):
        assert nth == seen[user, day]
        seen[user, day] += 1


def test_errors_have_the_stated_variance_of_which_the_stated_share_repeats():
    overrides = ["users=2000", "items=2000", "user_clusters=500", "categories=20", "subcategories=50"]
    p = parameters_of("biased", "small", [*overrides, "items_per_author=2"])
    incumbent = Incumbent(draw_world(p, 0).truth, 0)
    deviations = [p.retrieval_error, p.pre_ranking_error, p.coarse_error, p.ranking_error, p.reranking_error]
    wrong = np.einsum("snd,snd->sn", incumbent.user, incumbent.item)
    np.testing.assert_allclose(wrong.std(axis=1), np.sqrt(0.4) * np.array(deviations), rtol=0.1)
    np.testing.assert_allclose(incumbent.spread, np.sqrt(0.6) * np.array(deviations), rtol=1e-6)
    shared = np.corrcoef(wrong)[np.triu_indices(len(STAGES), 1)]
    np.testing.assert_allclose(shared, p.shared_error, atol=0.12)


def test_the_same_noise_never_comes_twice_and_fair_incumbents_have_no_wrong_taste():
    fair = Incumbent(draw_world(parameters_of("fair", "small"), 0).truth, 0)
    assert not fair.item.any()
    p = parameters_of("biased", "small", ["systematic=1"])
    wholly_wrong = Incumbent(draw_world(p, 0).truth, 0)
    assert wholly_wrong.item.any()
    assert not any(wholly_wrong.spread)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["drfit=0"], "drfit=0 (command line): drfit: unknown key; did you mean drift?"),
        (["users=many"], "users=many (command line): users: expected an integer, found 'many'"),
        (["items=1.5"], "items=1.5 (command line): items: expected an integer, found '1.5'"),
        (["users"], "users (command line): users: expected an integer, found ''"),
        (["users=0"], "users=0 (command line): users must be at least 1, found 0"),
        (["systematic=1.5"], "systematic=1.5 (command line): systematic is a share: from 0 to 1, found 1.5"),
        (["drift=nan"], "drift=nan (command line): drift must be a number, found nan"),
        (["days=2"], "days=2 (command line): days must be at least 3 (training, validation, test), found 2"),
        (["dims=30"], "dims=30 (command line): dims must be at most 21, found 30"),
        (["competitors=41"], "competitors=41 (command line): competitors must be at most ranked, 40; found 41"),
        (["requests=3"], "requests=3 (command line): requests must be from 1 to 86,400 a day, found 3 in 12 days"),
    ],
)
def test_bad_parameters_get_one_line(overrides, message):
    with pytest.raises(ConfigError) as error:
        parameters_of("fair", "small", overrides)
    assert str(error.value) == message


@pytest.mark.parametrize("override", ["exposed=50", "reranked=9", "retrieved=79", "items=300"])
def test_a_funnel_that_does_not_narrow_gets_one_line(override):
    with pytest.raises(ConfigError) as error:
        parameters_of("fair", "small", [override])
    assert len(str(error.value).splitlines()) == 1


def test_the_command_line(tmp_path):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    out = str(tmp_path / "log")
    sizes = ["--users", "50", "--requests", "30", "--days", "3"]
    schema = prepare(parser.parse_args([out, "drift=0.2", "--world", "misled", "--seed", "5", *sizes]))
    said = schema.provenance["parameters"]
    assert schema.provenance["seed"] == 5
    assert schema.provenance["world"] == "misled"
    assert (said["users"], said["requests"], said["drift"], said["systematic"]) == (50, 30, 0.2, WORLDS["misled"])
    with pytest.raises(DataError, match="exists already"):
        prepare(parser.parse_args([out]))
    with pytest.raises(ConfigError, match="--seed is -1; expected 0 or more"):
        prepare(parser.parse_args([out, "--seed", "-1"]))


def test_a_mistake_ends_the_command_with_one_line_and_code_2(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    arguments = parser.parse_args([str(tmp_path / "log"), "--users", "0"])

    def main() -> int:
        prepare(arguments)
        return 0

    assert run_command(main) == 2
    assert capsys.readouterr().err == "users=0 (command line): users must be at least 1, found 0\n"
    assert not any(tmp_path.iterdir())


def test_the_report_size_makes_sense():
    assert parameters_of("biased", "report").requests == SIZES["report"]["requests"]
