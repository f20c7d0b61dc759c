"""Compare the scores of runs, in bits per byte and nats a token, with their uncertainty.

    python records/compare.py logs/sweep --base none

compares every trial of a sweep with the trial `none`; `RUNS --against RUNS` compares two groups of
seeds. RUNS are run folders, folders that contain run folders, or train logs. Prints Markdown. Exit
status: 0 if all trials were compared, 1 if some were not, 2 if none was.
"""

import argparse
import itertools
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent)]

import numpy as np
from rich.console import Console
from rich.markdown import Markdown
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from runs import SCHEDULE, Run, RunError, by_name, is_one_training, read_runs
from tool import escape, tool
from train_gpt import VAL_BYTES, Score, env_form

RECORD_GAIN, RECORD_P = 0.005, 0.01  # the challenge's rule: nats a token, and the p of that claim
VAL_TOKENS = 62_021_845  # of the challenge's validation text, at a vocabulary of 1,024
ALPHA, POWER = 0.05, 0.8
LAST = "last"  # the name of the score of a run that is its last, whatever the pass
SCORE_HELP = f"default: the last that all have; {LAST}: that of each run"
BASES = ("base", "none")  # usual names of the trial that changes nothing
ONE_TRIAL = "Bits per byte (bpb): mean +- standard deviation over all seeds that have a score."
LEGEND = f"""\
{ONE_TRIAL}
Differences to the base: mean +- standard error; below 0 is better. Paired t test over the seeds of
both, or Welch's t test if they share fewer than two. p: two-sided; (Holm): corrected for all rows.
Detectable: true difference found at p < {ALPHA} with probability {POWER} at this standard error."""
RECORD_LEGEND = f"""\
Record: whether the trial is better than the base by {RECORD_GAIN} nats a token at p < {RECORD_P}
(one-sided, not corrected)."""

COMMON = {"machine": "machine", "ranks": "number of ranks", "code_sha256": "program"}

Table = list[list[str]]  # rows of cells, the header first


class CompareError(RunError):
    """Runs that cannot be compared. The message names the remedy."""


class EqualScoresError(CompareError):
    """Two groups with the same scores: what differs between them has no effect on these."""


# ---- Statistics ----


@dataclass(frozen=True)
class Difference:
    """A difference of two mean scores, a - b, in one unit. Below 0, a is better."""

    mean: float
    se: float  # standard error
    df: float  # degrees of freedom
    low: float  # 95 % confidence interval
    high: float
    p: float  # two-sided
    detectable: float  # the true difference found at p < 0.05 with a probability of 80 %


def t_test(a: np.ndarray, b: np.ndarray, paired: bool, alternative: str = "two-sided") -> Any:
    """Returns scipy's result for the difference of means of two samples: paired t, or Welch's t."""
    if paired:
        return stats.ttest_rel(a, b, alternative=alternative)
    return stats.ttest_ind(a, b, equal_var=False, alternative=alternative)


def difference(a: np.ndarray, b: np.ndarray, paired: bool) -> Difference:
    """Returns the difference of the means of two samples, [n] and [m].

    Raises CompareError if the scores have no variance.
    """
    se = stats.sem(a - b) if paired else math.hypot(stats.sem(a), stats.sem(b))
    if se < 1e-12:
        raise CompareError("all seeds differ by the same amount, so there is no variance to test")
    test = t_test(a, b, paired)
    interval = test.confidence_interval(1 - ALPHA)
    # The far tail of the two-sided test is negligible, and statsmodels computes it wrongly for
    # 1 < df < 2. With nobs = df + 1, TTestPower serves Welch's test as well.
    effect = TTestPower().solve_power(
        nobs=test.df + 1, alpha=ALPHA / 2, power=POWER, alternative="larger"
    )
    detectable = effect * math.sqrt(test.df + 1) * se
    values = a.mean() - b.mean(), se, test.df, *interval, test.pvalue, detectable
    return Difference(*map(float, values))


# ---- What can be compared ----


def with_last(runs: Iterable[Run]) -> list[Run]:
    """Returns runs that have their last score under the name LAST as well."""
    return [
        replace(run, scores={LAST: run.scores[run.final], **run.scores}) if run.final else run
        for run in runs
    ]


def common_score(runs: Sequence[Run], score: str | None) -> str:
    """Returns the name of a score that all finished runs have: `score`, or by default the last one.

    Raises CompareError if there is none.
    """
    finished = [run for run in runs if run.finished]
    names = finished[0].scores if finished else {}
    common = [name for name in names if all(name in run.scores for run in finished)]
    if score in common or (not score and {*common} - {LAST}):
        return score or common[-1]
    kinds = {
        ", ".join(name for name in run.scores if name != LAST) or "none": run.called
        for run in reversed(finished)
    }
    found = "; ".join(f"{called} has {scores}" for scores, called in kinds.items())
    raise CompareError(
        f"not all runs have {f'the score {score}' if score else 'a common score'}: "
        f"{found or 'no run has finished'}; choose other runs{f', or --score {LAST}' * bool(found)}"
    )


def has_score(run: Run, score: str) -> bool:
    """Returns whether the run has finished with a finite score."""
    found = run.scores.get(score) if run.finished else None
    return found is not None and math.isfinite(found.val_loss + found.val_bpb)


def counted(group: Sequence[Run], score: str) -> list[Run]:
    """Returns the runs of a group that have a score; if some state their seed, only those."""
    with_score = [run for run in group if has_score(run, score)]
    return [run for run in with_score if run.seed is not None] or with_score


def failures(group: Sequence[Run], score: str) -> list[str]:
    """Returns a line for each run of a group that does not count, with the reason."""
    lines, counts = [], counted(group, score)
    for run in group:
        reason = "no finite score" if run.finished else run.status
        if has_score(run, score):
            reason = "its seed is unknown, so it may be a copy of another run"
        told = f": {run.reason.splitlines()[-1]}" if run.reason else ""
        if run not in counts:
            lines.append(f"NOT COUNTED: {run.called}: {reason}{told}")
    return lines


def scored_group(group: Sequence[Run], score: str) -> list[Run]:
    """Returns the runs of a group that count. Raises CompareError if they are no group."""
    runs = counted(group, score)
    if len(runs) < 2:
        found = f"only seed {runs[0].seed} has a score" if runs else "no run has a score"
        raise CompareError(f"{found}; at least two seeds are needed: run it with another SEED")
    check_group(runs, score)
    return runs


def schedule_before(run: Run) -> dict[str, Any]:
    """Returns the settings of the schedule that RESUME has changed, as they were before."""
    return {k: x for k, x in run.resumed.get("changed", {}).items() if k in SCHEDULE}


def check_group(runs: Sequence[Run], score: str = "") -> None:
    """Raises CompareError unless the runs are trainings that differ in SEED only.

    With `score`, they must have been scored in one way on the same tokens as well.
    """
    remedy = "runs of one group may differ in SEED only"
    seeds = [run.seed for run in runs if run.seed is not None]
    if len(set(seeds)) < len(seeds):
        raise CompareError(f"a seed is twice in one group: {runs[0].name} has {seeds}")
    for run in runs[1:]:
        first, own = (
            x.choices
            | {f"{k} before RESUME": value for k, value in schedule_before(x).items()}
            | ({"last score": x.final} if score == LAST else {})
            for x in (runs[0], run)
        )
        for name in sorted({*first, *own}):
            if first.get(name) != own.get(name):
                values = f"{first.get(name)} in {runs[0].called}, {own.get(name)} in {run.called}"
                raise CompareError(f"{name.upper()} is {values}: {remedy}")
        if score and not same_tokens(runs[0], run, score):
            raise CompareError(f"{runs[0].called} and {run.called} have two tokenizers: {remedy}")
    programs = {run.code_sha256: run.called for run in reversed(runs) if run.code_sha256}
    if len(programs) > 1:
        found = ", ".join(f"{name} has sha256 {code[:8]}" for code, name in programs.items())
        raise CompareError(f"several programs in one group, {found}: {remedy}")
    check_seeds(itertools.combinations(runs, 2), score)


def check_seeds(pairs: Iterable[tuple[Run, Run]], score: str) -> None:
    """Raises CompareError if two runs are copies, or one training under two seeds."""
    for x, y in pairs:
        a, b = (run.scores.get(score) for run in (x, y))
        if a and b and (a.val_loss, a.val_bpb) == (b.val_loss, b.val_bpb):
            raise CompareError(
                f"{x.called} and {y.called} have the same score to the last digit, {a.val_bpb}: "
                "they are copies; leave one out"
            )
        if (x.seed is None or x.seed != y.seed) and is_one_training(x, y):
            raise CompareError(
                f"{x.called} and {y.called} are one training, resumed or quantized again: their "
                "losses are equal; leave one out"
            )


def same_tokens(x: Run, y: Run, score: str) -> bool:
    """Returns whether two runs were scored on the same tokens, or else on the same bytes only.

    Of what a log does not state, nats per bit tell the tokenizer. Raises CompareError if the
    validation text differs, or the stride of scoring on equal tokens.
    """
    a, b = x.scores[score], y.scores[score]
    if not (a.tokens and b.tokens):
        return math.isclose(a.val_loss * b.val_bpb, b.val_loss * a.val_bpb, rel_tol=1e-3)
    # Other scripts leave out the end of the challenge's text; logs round the score.
    tolerance = 1e-4 if math.isclose(a.bytes, VAL_BYTES, rel_tol=1e-4) else 1e-7
    same_bytes = a.bytes > 0 and math.isclose(a.bytes, b.bytes, rel_tol=tolerance)
    same = same_bytes and math.isclose(a.tokens, b.tokens, rel_tol=tolerance)
    hashes_known = x.val_sha256 and y.val_sha256
    if not same_bytes or (hashes_known and same != (x.val_sha256 == y.val_sha256)):
        texts = [
            f"{run.called}: {s.tokens:,} tokens, {s.bytes:,} bytes, sha256 "
            f"{run.val_sha256[:8] or 'unknown'}"
            for run, s in ((x, a), (y, b))
        ]
        raise CompareError(f"different validation data: {'; '.join(texts)}; score both on one text")
    one_pass = score != LAST or x.final == y.final
    if same and one_pass and a.stride and b.stride and a.stride != b.stride:
        raise CompareError(
            f"{x.called} was scored at stride {a.stride}, {y.called} at {b.stride}; score both "
            "with one EVAL_STRIDE, or choose another --score"
        )
    return same


def check_effect(a: Sequence[Run], b: Sequence[Run], score: str) -> None:
    """Raises EqualScoresError if each seed has the same score in two groups of runs."""
    of_a, of_b = ({run.seed: run.scores[score][:2] for run in side} for side in (a, b))
    shared = of_a.keys() & of_b.keys()
    if len(shared) < min(len(a), len(b)) or any(of_a[seed] != of_b[seed] for seed in shared):
        return
    first, other = a[0].choices, b[0].choices
    names = [n for n in sorted({*first, *other}) if first.get(n) != other.get(n)]
    reason = "what differs has no effect on it" if names else "they are copies"
    reason += f": {', '.join(names).upper()}" * bool(names)
    if a[0].final != b[0].final:
        reason += f"; --score {LAST} compares {a[0].final} with {b[0].final}"
    raise EqualScoresError(f"each seed has the same score ({score}) as in {b[0].name}: {reason}")


def record_rule_applies(score: Score) -> bool:
    """Returns whether a score is of the challenge's validation text and tokens."""
    found = (score.bytes, VAL_BYTES), (score.tokens, VAL_TOKENS)
    return all(math.isclose(*pair, rel_tol=1e-4) for pair in found)


def warnings_of(runs: Sequence[Run], score: str) -> list[str]:
    """Returns what weakens a comparison of these runs."""
    found = []
    for run in runs:
        failed = [name for name, verdict in run.verdicts.items() if verdict == "FAIL"]
        if failed:
            found.append(f"{run.called} is over a limit: {', '.join(failed)}")
        if not run.scores[score].tokens:
            found.append(f"{run.called} does not state its validation tokens; they may be others")
        changed = schedule_before(run)
        if changed:
            found.append(f"{run.called} was resumed from a run with {env_form(changed)}")
    for name, title in COMMON.items():
        if len({str(getattr(run, name)) for run in runs if getattr(run, name)}) > 1:
            found.append(f"not all runs have the same {title}")
    finals = {run.final: run.name for run in runs}
    if score != LAST and finals.keys() - {score}:
        later = ", ".join(sorted(finals.keys() - {score}))
        found.append(f"compared by {score}, but some runs have {later}: see --score {LAST}")
    elif len(finals) > 1:
        passes = ", ".join(f"{name} by {final}" for final, name in finals.items())
        found.append(f"the ways of scoring differ: {passes}")
    return found


# ---- The comparison ----


@dataclass(frozen=True)
class Comparison:
    """Group a compared with group b. Differences are a - b; below 0 group a is better."""

    score: str
    method: str  # paired t, or Welch t
    n_a: int
    n_b: int
    bpb: Difference
    nats: Difference | None  # a token; None for two tokenizers
    p_holm: float  # bpb.p, corrected for the other rows of a table
    record_p: float | None  # one-sided p that a is better by 0.005 nats; None on another text
    settings: dict[str, tuple[Any, Any]]  # those that differ: value of a, value of b
    notes: list[str]


def compare(group_a: Sequence[Run], group_b: Sequence[Run], score: str | None = None) -> Comparison:
    """Returns the comparison of two groups of seeds by a score; see common_score().

    Seeds that only one group has are left out of a paired test, whatever the reason, so that a
    failed run does not change the method. Raises CompareError if a comparison means nothing.
    """
    score = common_score([*group_a, *group_b], score)
    a, b = scored_group(group_a, score), scored_group(group_b, score)
    one_tokenizer = same_tokens(a[0], b[0], score)
    check_effect(a, b, score)
    check_seeds(itertools.product(a, b), score)
    notes = [*failures(group_a, score), *failures(group_b, score), *warnings_of([*a, *b], score)]
    if not one_tokenizer:
        notes.append("two tokenizers: only bits per byte can be compared")
    of_a, of_b = a[0].choices, b[0].choices
    if not (of_a and of_b):
        notes.append("a log has no settings, so what differs between the groups is unknown")
    names = sorted({*of_a, *of_b}) if of_a and of_b else []

    seeds_a, seeds_b = {run.seed: run for run in a}, {run.seed: run for run in b}
    shared = [seed for seed in seeds_a if seed in seeds_b]
    paired = len(shared) >= 2 and None not in {*seeds_a, *seeds_b}
    if paired:
        unpaired = sorted({*seeds_a} ^ {*seeds_b}, key=str)
        notes += [f"seed {x} is in one of {a[0].name} and {b[0].name} only" for x in unpaired]
        a, b = [seeds_a[seed] for seed in shared], [seeds_b[seed] for seed in shared]

    bpb_a, bpb_b = (np.array([x.scores[score].val_bpb for x in side]) for side in (a, b))
    nats_a, nats_b = (np.array([x.scores[score].val_loss for x in side]) for side in (a, b))
    bpb, nats, record_p = difference(bpb_a, bpb_b, paired), None, None
    if one_tokenizer:
        nats = difference(nats_a, nats_b, paired)
        if record_rule_applies(a[0].scores[score]) and b[0].scores[score].tokens:
            record_p = float(t_test(nats_a + RECORD_GAIN, nats_b, paired, "less").pvalue)
    return Comparison(
        score=score,
        method="paired t" if paired else "Welch t",
        n_a=len(a),
        n_b=len(b),
        bpb=bpb,
        nats=nats,
        p_holm=bpb.p,
        record_p=record_p,
        settings={k: (of_a.get(k), of_b.get(k)) for k in names if of_a.get(k) != of_b.get(k)},
        notes=notes,
    )


@dataclass
class Row:
    """A trial and its comparison with the base; the base has none."""

    name: str
    runs: list[Run]
    score: str
    comparison: Comparison | None = None
    refusal: str = ""  # why it was not compared
    equal: str = ""  # why there is no difference


def compare_all(groups: dict[str, list[Run]], base: str | None, score: str | None) -> list[Row]:
    """Returns a row for each group, the base first.

    Raises CompareError if no group can be compared with the base, or a single group is none.
    """
    base = base or next((name for name in BASES if name in groups), next(iter(groups)))
    if base not in groups:
        raise CompareError(
            f"no trial is named {base}; choose --base among {', '.join(groups)}, or give a second "
            "group after --against"
        )
    score = common_score([run for group in groups.values() for run in group], score)
    rows = [Row(name, groups[name], score) for name in [base, *(n for n in groups if n != base)]]
    if len(rows) == 1:
        check_group(counted(groups[base], score), score)
        return rows
    comparisons = []
    for row in rows[1:]:
        try:
            row.comparison = compare(row.runs, groups[base], score)
            comparisons.append(row.comparison)
        except EqualScoresError as error:
            row.equal = str(error)
        except CompareError as error:
            row.refusal = str(error)
    if all(row.refusal for row in rows[1:]):
        refused = [f"{row.name} cannot be compared with {base}: {row.refusal}" for row in rows[1:]]
        raise CompareError(
            "\n".join([*refused, *(x for r in rows for x in failures(r.runs, score))])
        )
    corrected = multipletests([c.bpb.p for c in comparisons] or [1.0], method="holm")[1].tolist()
    for row in rows:
        if row.comparison:
            row.comparison = replace(row.comparison, p_holm=corrected.pop(0))
    return rows


# ---- Tables ----


def score_table(rows: list[Row]) -> Table:
    """Returns the score of each trial and its difference to the base, in bits per byte and nats."""
    score, has_records = rows[0].score, has_record_column(rows)
    table = [["trial", "seeds", f"bpb, {score}"]]
    if len(rows) > 1:
        table[0] += [f"difference to {rows[0].name}", "95 % interval", "p", "p (Holm)"]
        table[0] += ["detectable", "test", "difference in nats"] + ["record"] * has_records
    for row in rows:
        values = [run.scores[score].val_bpb for run in counted(row.runs, score)]
        missing = f" of {len(row.runs)}" if len(values) < len(row.runs) else ""
        spread = f" +- {stdev(values):.5f}" if len(values) > 1 else ""
        cells = [row.name, f"{len(values)}{missing}", f"{fmean(values or [math.nan]):.5f}{spread}"]
        c = row.comparison
        if row.equal:
            cells += ["equal"]
        if c:
            cells += [f"{c.bpb.mean:+.5f} +- {c.bpb.se:.5f}"]
            cells += [f"{c.bpb.low:+.5f} to {c.bpb.high:+.5f}", f"{c.bpb.p:.2g}"]
            cells += [f"{c.p_holm:.2g}", f"{c.bpb.detectable:.5f}", c.method]
            cells += [f"{c.nats.mean:+.5f} +- {c.nats.se:.5f}" if c.nats else "not comparable"]
        if c and c.record_p is not None:
            cells += [f"{'yes' if c.record_p < RECORD_P else 'no'}, p = {c.record_p:.2g}"]
        table.append(cells + [""] * (len(table[0]) - len(cells)))
    return table


def has_record_column(rows: list[Row]) -> bool:
    """Returns whether the challenge's rule for records applies to one of the rows."""
    return any(row.comparison and row.comparison.record_p is not None for row in rows)


def context_table(rows: list[Row]) -> Table:
    """Returns the settings that differ, and the mean size and time of the finished runs."""
    settings = {row.name: row.comparison.settings for row in rows if row.comparison}
    own = {name: {k: pair[0] for k, pair in of.items()} for name, of in settings.items()}
    own[rows[0].name] = {k: pair[1] for of in settings.values() for k, pair in of.items()}
    table = [["trial", "settings", "bytes", "ms/step"]]
    for row in rows:
        texts = [f"{name.upper()}={value}" for name, value in own.get(row.name, {}).items()]
        finished = [run for run in row.runs if run.finished]
        sizes = [run.sizes["total"] for run in finished if "total" in run.sizes]
        times = [run.step_ms for run in finished if run.step_ms > 0]
        cells = [row.name, " ".join(sorted(texts)), f"{fmean(sizes):,.0f}" if sizes else ""]
        table.append([*cells, f"{fmean(times):,.1f}" if times else ""])
    return table


def markdown(table: Table) -> str:
    """Returns a table as Markdown."""
    head, *body = [[escape(cell) for cell in cells] for cells in table]
    rule = ["---" if title in ("trial", "settings") else "--:" for title in head]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *body))


def document(rows: list[Row], *more: str) -> str:
    """Returns Markdown: the table of scores, its legend, the parts in `more`, and the notes."""
    notes = [note for row in rows for note in failures(row.runs, row.score)]
    notes += [f"NOT COMPARED: {row.name}: {row.refusal}" for row in rows if row.refusal]
    notes += [f"EQUAL: {row.name}: {row.equal}" for row in rows if row.equal]
    notes += [note for row in rows if row.comparison for note in row.comparison.notes]
    lines = [f"- {escape(note)}" for note in dict.fromkeys(notes)]
    legend = LEGEND if len(rows) > 1 else ONE_TRIAL
    if has_record_column(rows):
        legend += f"\n{RECORD_LEGEND}"
    parts = [markdown(score_table(rows)), legend, *more, "\n".join(lines)]
    return "\n\n".join(part for part in parts if part) + "\n"


def markdown_table(runs: Sequence[Run], base: str | None = None, score: str | None = None) -> str:
    """Returns the table of scores of the trials among `runs`, with its legend and notes."""
    return document(compare_all(by_name(runs), base, score))


# ---- Command line ----


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUNS", help="trials to compare; with --against one group")
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--against", nargs="+", metavar="RUNS", help="the group to compare with")
    other.add_argument("--base", metavar="NAME", help="the trial to compare with (default: base)")
    add("--score", metavar="NAME", help=SCORE_HELP)
    add("--json", action="store_true", help="print JSON")
    return parser.parse_args(argv)


def as_json(value: Run | Comparison) -> Any:
    """Returns what JSON has for a run, its path, or for a comparison."""
    return str(value.path) if isinstance(value, Run) else asdict(value)


@tool
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit status."""
    args = parse(argv)
    groups, base = by_name(with_last(read_runs(args.runs))), args.base
    if args.against:
        name, base = args.runs[0], args.against[0]
        if name == base:
            raise CompareError(f"{name} is on both sides; give another group after --against")
        groups = {base: with_last(read_runs(args.against)), name: with_last(read_runs(args.runs))}
    rows = compare_all(groups, base, args.score)
    if args.json:
        print(json.dumps([vars(row) for row in rows], indent=2, default=as_json))
    elif sys.stdout.isatty():
        Console().print(Markdown(document(rows, markdown(context_table(rows)))))
    else:
        print(document(rows, markdown(context_table(rows))), end="")
    return int(any(row.refusal for row in rows))


if __name__ == "__main__":
    sys.exit(main())
