"""The report in words and tables: Markdown to read, CSV to go on with."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta

import pandas as pd

from joint.comparison.analysis import Contrast, Metric, Summary
from joint.comparison.comparison import Comparison
from joint.comparison.goals import higher_is_better, is_distance
from joint.comparison.statistics import MARGIN

MARKS = {"better": "▲", "worse": "▼", "same": "=", "unclear": "·", "incomplete": "?", "too few": "?"}


def markdown(
    comparison: Comparison,
    metrics: Sequence[Metric],
    untuned: Metric | None,
    figures: Mapping[str, str],
) -> str:
    """The text of `report.md`; `figures` are the paths of pictures by metric, and of 'funnel'."""
    primary, *others = metrics
    parts = [f"# {comparison.name}", *headline(comparison, primary)]
    parts += ["## The claim: `" + primary.name + "`", *_metric_part(comparison, primary, figures)]
    if comparison.placebos:
        parts += ["## Against placebos", _PLACEBO, _table(_placebo_rows(metrics))]
    if "funnel" in figures:
        parts += ["## The funnel", f"![Share of the positives left after each stage]({figures['funnel']})"]
    if others:
        parts += ["## All metrics at a glance", _GLANCE, _table(_glance_rows(comparison, metrics))]
        for metric in others:
            parts += [f"### `{metric.name}`", *_metric_part(comparison, metric, figures)]
    if comparison.tuning:
        parts += ["## Tuning", *_tuning_parts(comparison, untuned)]
    parts += ["## What differs", *_difference_parts(comparison)]
    parts += ["## Runs", *_run_parts(comparison), "## How to read this", _reading(comparison)]
    return "\n\n".join(parts) + "\n"


_PLACEBO = (
    "A placebo has what a variant costs (its samples, its parameters) without what it is about. Each row is a "
    "variant minus its placebo, with a test of its own; *helps* needs both, this and the baseline, on the claim."
)
_GLANCE = "Mean of each variant, with its verdict: ▲ better, ▼ worse, = same, · unclear, ? no verdict."


def headline(comparison: Comparison, primary: Metric) -> Iterator[str]:
    """A paragraph on the baseline, and one in plain words on every variant."""
    baseline = primary.summaries[comparison.baseline]
    yield (
        f"Held against **{comparison.baseline}** ({_number(baseline.mean)} ± {_number(baseline.std)}, "
        f"{_count(comparison, len(baseline.values), baseline.planned)}) on `{primary.name}`"
        f"{' (distance from 1)' if is_distance(primary.name) else ''}, where "
        f"{'higher' if higher_is_better(primary.name) else 'lower'} is better:"
    )
    for contrast in primary.contrasts.values():
        yield f"**{contrast.variant}** {_sentence(comparison, primary, contrast)}"
    bad = [result for result in comparison.results if result.state != "finished"]
    if bad:
        yield f"**{len(bad)} of {len(comparison.results)} runs have no result**; they are listed under Runs."


def _sentence(comparison: Comparison, primary: Metric, contrast: Contrast) -> str:
    name, summary = contrast.variant, primary.summaries[contrast.variant]
    role = f"(the placebo of {comparison.placebos[name]}) " if name in comparison.placebos else ""
    gaps = {
        "not measured": "has no such metric.",
        "too few": f"has {len(summary.values)} result(s) to compare; a test needs two.",
        "incomplete": f"has no verdict: {_missing(primary, contrast)}.",
    }
    evidence = f"{_number(summary.mean)}: {_evidence(contrast)}"
    said = {
        "better": f"{_helps(comparison, primary, name)} ({evidence}).",
        "worse": f"is worse ({evidence}).",
        "same": f"makes no difference: certainly within ±{MARGIN:.0%} ({evidence}).",
        "unclear": f"is unclear: neither a difference nor its absence is shown ({evidence}).",
    }
    if contrast.verdict in ("incomplete", "too few") and contrast.test.n:
        return role + gaps[contrast.verdict] + f" So far: {evidence}."
    return role + (gaps | said)[contrast.verdict]


def _missing(primary: Metric, contrast: Contrast) -> str:
    lacking = [name for name in (contrast.variant, contrast.reference) if not primary.summaries[name].complete]
    return f"not every run of {' and '.join(lacking)} has this metric, and those that lack it may be the bad ones"


def _helps(comparison: Comparison, primary: Metric, name: str) -> str:
    """A variant that beats the baseline, by what its placebos say."""
    placebos = [placebo for placebo, of in comparison.placebos.items() if of == name]
    if name in comparison.placebos:
        return "is better than the baseline, though it is only a placebo"
    if not placebos:
        return "is better than the baseline; no placebo says whether by what it is about or by what it costs"
    unbeaten = [placebo for placebo in placebos if primary.placebos[placebo].verdict != "better"]
    if not unbeaten:
        return f"**helps**: it beats the baseline and its placebo {' and '.join(placebos)}"
    return f"beats the baseline but not its placebo {' and '.join(unbeaten)}, so what they share may be what helps"


def _evidence(contrast: Contrast) -> str:
    test = contrast.test
    interval = f", 95 % interval {_signed(test.low)} to {_signed(test.high)}" if math.isfinite(test.low) else ""
    relative = f" ({contrast.relative:+.1%})" if math.isfinite(contrast.relative) else ""
    p = f", p {_p(contrast.adjusted)}" if not math.isnan(contrast.adjusted) else ""
    return f"{_signed(test.difference)}{relative}{interval}{p}"


def _metric_part(comparison: Comparison, metric: Metric, figures: Mapping[str, str]) -> Iterator[str]:
    way = "Higher" if higher_is_better(metric.name) else "Lower"
    what = " The number is its distance from 1." if is_distance(metric.name) else ""
    yield f"{way} is better.{what}"
    yield _table([_row(comparison, metric, name) for name in comparison.variants])
    yield from (f"Note: {oddity}." for oddity in metric.oddities)
    if metric.name in figures:
        yield f"![{metric.name} per variant]({figures[metric.name]})"


def _row(comparison: Comparison, metric: Metric, name: str) -> dict[str, str]:
    summary, contrast = metric.summaries[name], metric.contrasts.get(name)
    of = comparison.placebos.get(name)
    return {
        "variant": f"{name} (placebo of {of})" if of else name,
        "n": f"{len(summary.values)}" + (f" of {summary.planned}" if not summary.complete else ""),
        "mean ± std": _mean_std(summary),
        **(_contrast_cells(contrast) if contrast else {"verdict": "baseline"}),
    }


def _contrast_cells(contrast: Contrast) -> dict[str, str]:
    test = contrast.test
    small = contrast.verdict in ("better", "worse") and test.p_same < 0.05
    return {
        "difference": f"{_signed(test.difference)} ({contrast.relative:+.1%})" if test.n else "-",
        "95 % interval": f"{_signed(test.low)} to {_signed(test.high)}" if math.isfinite(test.low) else "-",
        "p (Holm)": _p(contrast.adjusted),
        "p same": _p(test.p_same),
        "95 % over users": " to ".join(map(_signed, contrast.users)) if contrast.users else "-",
        "verdict": contrast.verdict + (f", by less than {MARGIN:.0%}" if small else ""),
    }


def _placebo_rows(metrics: Sequence[Metric]) -> list[dict[str, str]]:
    return [
        {"metric": f"`{metric.name}`", "variant": c.variant, "minus its placebo": c.reference, "n": str(c.test.n)}
        | {("verdict" if key == "verdict" else key): cell for key, cell in _contrast_cells(c).items()}
        for metric in metrics
        for c in metric.placebos.values()
    ]


def _glance_rows(comparison: Comparison, metrics: Sequence[Metric]) -> list[dict[str, str]]:
    return [
        {"metric": f"`{metric.name}`" + ("" if higher_is_better(metric.name) else " (lower is better)")}
        | {
            name: " ".join(
                [
                    _number(metric.summaries[name].mean),
                    MARKS.get(metric.contrasts[name].verdict, "") if name in metric.contrasts else "",
                ]
            ).strip()
            for name in comparison.variants
        }
        for metric in metrics
    ]


def _tuning_parts(comparison: Comparison, untuned: Metric | None) -> Iterator[str]:
    yield (
        f"Every variant had the same number of trials on the same draws, judged by `{comparison.primary}` on the "
        "validation part; trial 0 is the variant as written, and all that one without any of the keys has. The runs "
        "above use the best trial's values, with fresh seeds, on the test part."
    )
    yield _table([_tuning_row(comparison, name) for name in comparison.variants])
    if untuned is not None:
        yield "As written, untuned, on the test part:"
        yield _table([_row(comparison, untuned, name) for name in comparison.variants])


def _tuning_row(comparison: Comparison, name: str) -> dict[str, str]:
    tuning = comparison.tuning[name]
    best = tuning.trials[tuning.best] if tuning.best is not None else None
    finished = [trial for trial in tuning.trials if trial.state == "finished"]
    values = ", ".join(f"{key} {value:g}" for key, value in best.values.items()) if best else "-"
    return {
        "variant": name,
        "trials finished": f"{len(finished)} of {len(tuning.trials)}",
        "as written": _number(finished[0].metrics.get(comparison.primary, math.nan)) if finished else "-",
        "best trial": "-" if best is None else _number(best.metrics[comparison.primary]),
        "its values": values or "as written",
        "keys it lacks": ", ".join(tuning.skipped) or "-",
        "time": _time(sum(trial.seconds for trial in tuning.trials)),
    }


def _difference_parts(comparison: Comparison) -> Iterator[str]:
    yield f"Keys of the config, as `key: value of {comparison.baseline} != value of the variant`."
    for name in comparison.variants:
        if name != comparison.baseline:
            lines = [f"- `{line}`" for line in comparison.differs[name]] or ["- nothing: it is the baseline"]
            yield "\n".join([f"**{name}**", "", *lines])


def _run_parts(comparison: Comparison) -> Iterator[str]:
    yield _table(list(_provenance_rows(comparison)))
    yield _table([_time_row(comparison, name) for name in comparison.variants])
    if comparison.left_out:
        yield f"Not asked to run this time: {', '.join(comparison.left_out)}; what finished before is in the tables."
    trials = [trial for tuning in comparison.tuning.values() for trial in tuning.trials]
    bad = [r for r in [*comparison.results, *trials] if r.state != "finished" or r.note]
    if bad:
        yield "Runs that failed, did not finish or were not started, and metrics that are not finite:"
        rows = [{"run": f"`{r.path}`", "state": r.state, "what it said": _cell(r.note or "-")} for r in bad]
        yield _table(rows)
    else:
        yield "Every run finished."


def _provenance_rows(comparison: Comparison) -> Iterator[dict[str, str]]:
    """What the runs were made with and on; more than one value in a row is a reason for doubt."""
    finished = [result for result in comparison.results if result.state == "finished"]

    def each(key: str) -> str:
        found = dict.fromkeys(str(result.environment.get(key)) for result in finished)
        return "; ".join(found) or "-"

    for world in dict.fromkeys(result.world for result in finished):
        hashes = dict.fromkeys(str(r.environment.get("dataset"))[:16] for r in finished if r.world == world)
        yield {"what": f"dataset {world}".strip(), "value": ", ".join(f"`{found}`" for found in hashes)}
    yield {"what": "code version", "value": ", ".join(dict.fromkeys(r.code or "unknown" for r in finished)) or "-"}
    for key in ("joint", "python", "versions", "machine", "gpu", "ranks"):
        yield {"what": key, "value": _cell(re.sub(r"[{}']", "", each(key)))}


def _time_row(comparison: Comparison, name: str) -> dict[str, str]:
    own = [result for result in comparison.results if result.variant == name]
    seconds = [result.seconds for result in own if result.state == "finished"]
    states = [result.state for result in own]
    return {"variant": name} | {
        "runs": str(len(own)),
        **{state: str(states.count(state)) for state in ("finished", "failed", "unfinished", "missing")},
        "time a run": _time(sum(seconds) / len(seconds)) if any(seconds) else "-",
    }


def _reading(comparison: Comparison) -> str:
    several = len({result.world for result in comparison.results}) > 1
    unit = (
        "A unit is a world, its value the mean over seeds" if several else "A unit is a seed, the same for all variants"
    )
    return (
        f"{unit}; n counts units. The interval and p are of Student's paired t-test over units; p is adjusted by Holm "
        "over the variants of a metric (over the placebos, in their table). *Better*, *worse*: adjusted p below .05. "
        f"*Same*: two one-sided tests, each at .05, put the difference within ±{MARGIN:.0%} of the reference's mean. "
        "*Unclear*: none of these; more units may tell. *Incomplete*: a run failed or is missing, and the ones that "
        "fail may be the bad ones, so there is no verdict. *Over users*: the difference if other users had come, the "
        "trained models being these (1,000 bootstrap draws of users); it says nothing of other seeds. Only "
        f"`{comparison.primary}` was named beforehand: among many other metrics some differ by chance."
    )


def rows_csv(comparison: Comparison) -> str:
    """The text of `report.csv`: one row for every value of every run."""
    arms = [("", comparison.results), (" (untuned)", comparison.untuned)]
    rows = [
        (f"{r.variant}{arm}", r.world, r.seed, metric, value)
        for arm, results in arms
        for r in results
        for metric, value in r.metrics.items()
    ]
    return pd.DataFrame(rows, columns=["variant", "world", "seed", "metric", "value"]).to_csv(index=False)


def summary_csv(comparison: Comparison, metrics: Sequence[Metric]) -> str:
    """The text of `summary.csv`: one row for every metric and pair that was compared."""
    rows = []
    for metric in metrics:
        for contrast in [*metric.contrasts.values(), *metric.placebos.values()]:
            summary, test = metric.summaries[contrast.variant], contrast.test
            rows.append(
                {"metric": metric.name, "variant": contrast.variant, "reference": contrast.reference}
                | {"mean": summary.mean, "std": summary.std, "n": test.n, "difference": test.difference}
                | {"low": test.low, "high": test.high, "p": test.p, "p_holm": contrast.adjusted, "p_same": test.p_same}
                | dict(zip(("users_low", "users_high"), contrast.users or (math.nan, math.nan), strict=True))
                | {"verdict": contrast.verdict}
            )
    return pd.DataFrame(rows).to_csv(index=False)


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    """A Markdown table; a column is there if any row has it."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    if "verdict" in columns:
        columns = [column for column in columns if column != "verdict"] + ["verdict"]
    lines = [columns, ["---"] * len(columns), *([row.get(column, "") for column in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _count(comparison: Comparison, n: int, planned: int) -> str:
    unit = "worlds" if len({result.world for result in comparison.results}) > 1 else "seeds"
    return f"{n} {unit}" if n == planned else f"{n} of {planned} {unit}"


def _mean_std(summary: Summary) -> str:
    if not summary.values:
        return "-"
    return _number(summary.mean) + (f" ± {_number(summary.std)}" if len(summary.values) > 1 else "")


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}" if abs(value) < 100 else f"{value:,.1f}"


def _signed(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:+.4f}" if abs(value) < 100 else f"{value:+,.1f}"


def _p(value: float) -> str:
    return "-" if math.isnan(value) else "< .001" if value < 0.001 else f"{value:.2g}".lstrip("0")


def _time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _cell(text: str) -> str:
    """Text that cannot break a table."""
    return text.replace("|", "\\|").replace("\n", " ")
