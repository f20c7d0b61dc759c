"""Say whether runs differ in score by more than chance, and how small a difference would show.

    python records/compare.py logs/sweep
        every trial of a sweep against its base (--base NAME)
    python records/compare.py logs/mine --against records/track_10min_16mb/2026-03-25_Theirs
        one group of seeds against another

RUNS are run folders, folders that hold them at any depth, or train logs. Into a pipe the tables are
Markdown. Exit status: 0 all was compared; 1 some trials could not be; 2 none could.
"""

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent)]

import numpy as np
from rich.console import Console
from rich.markdown import Markdown
from scipy import optimize, stats

from runs import SCORE_LINES, Run, RunError, Score, by_name, read_runs
from train_gpt import VAL_BYTES

BAR, BAR_P = 0.005, 0.01  # a record is better by so many nats a token, shown at such a p
VAL_TOKENS = 62_021_845  # of the challenge's text in 1,024 pieces, as the bar counts them
ALPHA, POWER = 0.05, 0.8  # of intervals, and of the smallest difference to be seen
BASES = ("base", "none")  # names of a sweep's trial that changes nothing
ALONE = "Bits per byte: mean +- standard deviation over all seeds with a score."
LEGEND = f"""\
{ALONE}
Differences +- standard error, below 0 is better: of a paired t over the seeds that both have, else
of the two means. p: two-sided, of no difference, each row for itself (Holm: adjusted for all rows).
visible: the smallest true difference that gives p < 0.05 in 80 % of such experiments (noncentral t,
the standard error taken as it is here)."""
BAR_LEGEND = f"""\
A record is better by {BAR} nats a token at p < {BAR_P}: one-sided, each row for itself; the null is
that it is better by {BAR} or less."""
NO_BAR = f"""\
The bar of a record, {BAR} nats a token, does not apply: it is of the challenge's validation text in
1,024 pieces, about 2.4 bytes a token, and this is another text or vocabulary."""

Table = list[list[str]]  # rows of cells, the header first


class CompareError(ValueError):
    """Runs that cannot be compared, with the remedy."""


# ---- Statistics ----


def t_test(a: np.ndarray, b: np.ndarray, paired: bool, null: float = 0.0) -> tuple[Any, ...]:
    """The t test of a - b along the last axis, of pairs or of two samples (Welch).

    Returns difference of means, its standard error, degrees of freedom, the two-sided p of a true
    difference of `null`, and the one-sided p of `null` or more.
    """
    n, m = a.shape[-1], b.shape[-1]
    if paired:
        se, df = (a - b).std(-1, ddof=1) / math.sqrt(n), n - 1
    else:
        u, v = a.var(-1, ddof=1) / n, b.var(-1, ddof=1) / m
        se, df = np.sqrt(u + v), (u + v) ** 2 / (u**2 / (n - 1) + v**2 / (m - 1))
    diff = a.mean(-1) - b.mean(-1)
    with np.errstate(divide="ignore", invalid="ignore"):  # the caller sees a spread of 0
        t = (diff - null) / se
    return diff, se, df, 2 * stats.t.sf(abs(t), df), stats.t.cdf(t, df)


def detectable(se: float, df: float) -> float:
    """The true difference that gives p < 0.05, two-sided, in 80 % of such experiments.

    By the noncentral t distribution; the standard error observed is taken for the true one.
    """
    edge = stats.t.isf(ALPHA / 2, df)
    # The far tail adds less than 1e-7 to the power, and scipy's is NaN for few degrees of freedom.
    return se * optimize.brentq(lambda x: stats.nct.sf(edge, df, x) - POWER, 0, 2 * edge + 2)


def holm(ps: Sequence[float]) -> list[float]:
    """The p's adjusted for being several: 5 % of tables have any below 0.05 by chance."""
    adjusted, highest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        adjusted[i] = highest = max(highest, min(1.0, (len(ps) - rank) * ps[i]))
    return adjusted


# ---- What can be compared ----


def common_score(runs: Sequence[Run], score: str | None) -> str:
    """The score asked for, or else the last that all finished runs have."""
    done = [run for run in runs if run.finished]
    have = [name for name in SCORE_LINES if done and all(name in run.scores for run in done)]
    if not have or (score or have[-1]) not in have:
        said = "; ".join(f"{run.called} has {', '.join(run.scores) or 'none'}" for run in done)
        raise CompareError(
            f"not all runs have {f'the score {score}' if score else 'one score'}: "
            f"{said or 'none has finished'}; give other runs{' or another --score' * bool(score)}"
        )
    return score or have[-1]


def counts(run: Run, score: str) -> bool:
    """Whether the run came to its score, and that is a number."""
    return run.finished and math.isfinite(run.scores[score].val_loss + run.scores[score].val_bpb)


def lost(group: Sequence[Run], score: str) -> list[str]:
    """A line for each run that does not count, and why."""
    return [
        f"NOT COUNTED: {run.called}: {'no finite score' if run.finished else run.status}"
        + (f": {run.reason.splitlines()[-1]}" if run.reason else "")
        for run in group
        if not counts(run, score)
    ]


def counted(group: Sequence[Run], score: str) -> list[Run]:
    """The runs of a group that count; CompareError unless they are several seeds of one thing."""
    runs = [run for run in group if counts(run, score)]
    if len(runs) < 2:
        have = f"one run with a score, seed {runs[0].seed}" if runs else "no run with a score"
        raise CompareError(f"{have}, of {len(group)}: two are the least; run it under another SEED")
    one_thing(runs, score)
    return runs


def apart(*paths: Path) -> list[str]:
    """Paths as they go on from the deepest folder that holds them all."""
    paths = [path.absolute() for path in paths]
    folder = os.path.commonpath([path.parent for path in paths])
    return [str(path.relative_to(folder)) for path in paths]


def one_thing(runs: Sequence[Run], score: str = "") -> None:
    """CompareError unless these runs are seeds of one thing, scored on one text if that is told."""
    seeds: dict[int, Path] = {}
    for run in runs:
        if run.seed in seeds:
            twice = " and ".join(apart(seeds[run.seed], run.path))
            raise CompareError(
                f"seed {run.seed} is in one group twice, {twice}: give one of them, or two groups"
            )
        if run.seed is not None:
            seeds[run.seed] = run.path
        one, other = runs[0].choices, run.choices
        for key in sorted({*one, *other}):
            if (value := other.get(key)) != (first := one.get(key)):
                raise CompareError(
                    f"{key.upper()} is {first} in {runs[0].called}, {value} in {run.called}: a "
                    "group's runs may differ in SEED alone; give one of them, or two groups"
                )
    codes = {run.code_sha256: run.called for run in reversed(runs) if run.code_sha256}
    if len(codes) > 1:
        said = ", ".join(f"{name} of sha256 {code[:8]}" for code, name in codes.items())
        raise CompareError(
            f"one group of several programs, {said}: run all its seeds with one train_gpt.py, or "
            "give two groups"
        )
    if score and not all(same_tokens(runs[0], run, score) for run in runs[1:]):
        raise CompareError(f"two tokenizers in one group, {runs[0].name}; split it")


def same_tokens(x: Run, y: Run, score: str) -> bool:
    """Whether both were scored on the same tokens; if not, it was on the same bytes at least."""
    a, b = x.scores[score], y.scores[score]
    # Scripts cut the end off the challenge's text; of any text a log's rounding loses a little.
    within = 1e-4 if math.isclose(a.bytes, VAL_BYTES, rel_tol=1e-4) else 1e-7
    bytes_agree = a.bytes > 0 and math.isclose(a.bytes, b.bytes, rel_tol=within)
    same = bytes_agree and math.isclose(a.tokens, b.tokens, rel_tol=within)
    hashes = {run.val_sha256 for run in (x, y)}
    if not bytes_agree or ("" not in hashes and same != (len(hashes) == 1)):
        texts = (
            f"{run.called}: {of.tokens:,} tokens, {of.bytes:,} bytes, sha256 "
            f"{run.val_sha256[:8] or 0}"
            for run, of in ((x, a), (y, b))
        )
        raise CompareError(
            f"different validation data (0: not said): {'; '.join(texts)}; score both on one text"
        )
    if same and a.stride and b.stride and a.stride != b.stride:
        raise CompareError(
            f"{x.called} was scored at stride {a.stride}, {y.called} at {b.stride}, so with "
            "other context; score both with one EVAL_STRIDE, or choose another --score"
        )
    return same


def has_bar(score: Score) -> bool:
    """Whether its nats a token are those of the challenge's rule: of its text, in its tokens."""
    pairs = (score.bytes, VAL_BYTES), (score.tokens, VAL_TOKENS)
    return all(math.isclose(*pair, rel_tol=1e-4) for pair in pairs)


def cautions(runs: Sequence[Run], score: str) -> list[str]:
    """What speaks against the runs, or differs between them beside settings."""
    found = []
    for run in runs:
        if failed := [name for name, verdict in run.verdicts.items() if verdict == "FAIL"]:
            found.append(f"{run.called} is over a limit: {', '.join(failed)}")
    for name in ("machine", "ranks"):
        if len({str(value) for run in runs if (value := getattr(run, name))}) > 1:
            found.append(f"not all runs have the same {name}")
    if ends := {run.final for run in runs} - {score}:
        found.append(f"compared by {score}, though some runs end with {', '.join(sorted(ends))}")
    return found


# ---- The comparison ----


@dataclass(frozen=True)
class Comparison:
    """Group a against group b. Differences are a - b: below 0 group a is the better one.

    Where two tokenizers leave only bits per byte, what is of nats is None; on another text than the
    challenge's, or in other tokens, what is of the bar.
    """

    score: str
    method: str  # paired t, or Welch t
    n_a: int
    n_b: int
    df: float
    bpb_diff: float
    bpb_se: float
    low: float  # 95 % interval, bpb
    high: float
    detectable: float  # the smallest difference to be seen, bpb: see detectable()
    p: float  # two-sided
    p_holm: float  # the same, adjusted for the other rows of a table
    nats_diff: float | None  # a token
    nats_se: float | None
    nats_detectable: float | None
    bar_p: float | None  # one-sided; the null: a is better by 0.005 nats a token or less
    bar_met: bool | None  # bar_p < 0.01
    settings: dict[str, tuple[Any, Any]]  # those that differ: of a, of b
    notes: list[str]


def compare(group_a: Sequence[Run], group_b: Sequence[Run], score: str | None = None) -> Comparison:
    """Compare two groups of seeds; CompareError where that would mean nothing."""
    both = [*group_a, *group_b]
    score = common_score(both, score)
    a, b = counted(group_a, score), counted(group_b, score)
    seen: dict[tuple[float, float], Run] = {}
    for run in (*a, *b):
        exact = run.scores[score].val_loss, run.scores[score].val_bpb
        if exact in seen:
            raise CompareError(
                f"{seen[exact].called} and {run.called} have the same score to the last digit, "
                f"{exact[1]}: two seeds that do are one run, two settings that do are one; "
                "leave one out"
            )
        seen[exact] = run
    in_nats = same_tokens(a[0], b[0], score)
    notes = [*lost(both, score), *cautions([*a, *b], score)]
    if not in_nats:
        notes.append("two tokenizers on a text of as many bytes: only bits per byte compare")
    codes = [next((x for run in side if (x := run.code_sha256)), "") for side in (a, b)]
    if all(codes) and codes[0] != codes[1]:
        said = (f"{side[0].name} has {code[:8]}" for side, code in zip((a, b), codes, strict=True))
        notes.append(f"two programs, by sha256: {', '.join(said)}")
    one, two = a[0].choices, b[0].choices
    names = sorted({*one, *two}) if one and two else []
    if not names:
        notes.append("a log without settings: what differs between the groups is not known")

    of_a, of_b = {run.seed: run for run in a}, {run.seed: run for run in b}
    shared, lone = [seed for seed in of_a if seed in of_b], set(of_a) ^ set(of_b)
    # A seed that one side lacks is left out, whatever the reason: that must not choose the test.
    paired = len(shared) >= 2 and None not in {*of_a, *of_b}
    if paired:
        a, b = [of_a[seed] for seed in shared], [of_b[seed] for seed in shared]
        pair = f"{a[0].name} and {b[0].name}"
        notes += [f"the pairs of {pair} are without seed {seed}" for seed in sorted(lone)]

    def test(unit: str, null: float = 0.0) -> list[float]:
        sides = ([getattr(run.scores[score], unit) for run in side] for side in (a, b))
        return [float(x) for x in t_test(*map(np.array, sides), paired, null)]

    diff, se, df, p, _ = test("val_bpb")
    if se < 1e-12:
        raise CompareError(
            "every seed differs by the same, so chance has no size; are these copies?"
        )
    half = stats.t.isf(ALPHA / 2, df) * se
    nats, nats_se, nats_df, _, bar_p = test("val_loss", -BAR) if in_nats else [None] * 5
    bar_p = bar_p if in_nats and has_bar(a[0].scores[score]) else None
    return Comparison(
        score=score,
        method="paired t" if paired else "Welch t",
        n_a=len(a),
        n_b=len(b),
        df=df,
        bpb_diff=diff,
        bpb_se=se,
        low=diff - half,
        high=diff + half,
        detectable=detectable(se, df),
        p=p,
        p_holm=p,
        nats_diff=nats,
        nats_se=nats_se,
        nats_detectable=detectable(nats_se, nats_df) if in_nats else None,
        bar_p=bar_p,
        bar_met=None if bar_p is None else bar_p < BAR_P,
        settings={k: (one.get(k), two.get(k)) for k in names if one.get(k) != two.get(k)},
        notes=notes,
    )


# ---- Tables ----


@dataclass
class Row:
    """A trial: its runs, and how it compares with the base; the base has no comparison."""

    name: str
    runs: list[Run]
    score: str  # by name
    comparison: Comparison | None = None
    refusal: str = ""

    @property
    def settings(self) -> dict[str, tuple[Any, Any]]:
        """The settings that differ: its own, the base's."""
        return self.comparison.settings if self.comparison else {}


def compare_all(groups: dict[str, list[Run]], base: str | None, score: str | None) -> list[Row]:
    """A row for each group, the base first; CompareError if none can be compared with it.

    A group alone is a row, if its runs are seeds of one thing.
    """
    base = base or next((name for name in BASES if name in groups), next(iter(groups)))
    if base not in groups:
        raise CompareError(
            f"base {base} of trials {', '.join(groups)}: it takes a --base among them, or a second "
            "group after --against"
        )
    score = common_score([run for group in groups.values() for run in group], score)
    rows = [Row(name, groups[name], score) for name in [base, *(n for n in groups if n != base)]]
    if len(rows) == 1:
        one_thing([run for run in groups[base] if counts(run, score)], score)
        return rows
    for row in rows[1:]:
        try:
            row.comparison = compare(row.runs, groups[base], score)
        except CompareError as error:
            row.refusal = str(error)
    done = [row for row in rows if row.comparison]
    if not done:
        refused = [f"{row.name} cannot be compared with {base}: {row.refusal}" for row in rows[1:]]
        raise CompareError(
            "\n".join([*refused, *(x for row in rows for x in lost(row.runs, score))])
        )
    for row, p in zip(done, holm([row.comparison.p for row in done]), strict=True):
        row.comparison = replace(row.comparison, p_holm=p)
    return rows


def score_table(rows: list[Row]) -> Table:
    """What each trial scores, how far that is from the base, and what such data can show."""
    score, several = rows[0].score, sum(bool(row.comparison) for row in rows) > 1
    table = [["trial", "seeds", f"bpb, {score}"]]
    if len(rows) > 1:
        table[0] += [f"less {rows[0].name}", "95 % interval", "p"]
        table[0] += [*["p (Holm)"] * several, "visible", "test"]
    for row in rows:
        values = [run.scores[score].val_bpb for run in row.runs if counts(run, score)]
        missing = f" of {len(row.runs)}" if len(values) < len(row.runs) else ""
        spread = f" +- {stdev(values):.5f}" if len(values) > 1 else ""
        cells = [row.name, f"{len(values)}{missing}", f"{fmean(values or [math.nan]):.5f}{spread}"]
        if c := row.comparison:
            cells.append(f"{c.bpb_diff:+.5f} +- {c.bpb_se:.5f}")
            cells += [f"{c.low:+.5f} to {c.high:+.5f}", f"{c.p:.2g}"]
            cells += [*[f"{c.p_holm:.2g}"] * several, f"{c.detectable:.5f}", c.method]
        table.append(cells + [""] * (len(table[0]) - len(cells)))
    return table


def barred(rows: list[Row]) -> bool:
    """Whether the bar of a record applies."""
    return any(row.comparison and row.comparison.bar_met is not None for row in rows)


def nats_table(rows: list[Row]) -> Table:
    """The differences in nats a token, and whether a trial would be a record over the base."""
    table = [["trial", f"nats less {rows[0].name}", "visible"]]
    if bar := barred(rows):
        table[0] += [f"better by {BAR}", "p"]
    for row in rows[1:]:
        cells, met = ["not comparable", ""], ["", ""]
        if (c := row.comparison) and c.nats_diff is not None:
            cells = [f"{c.nats_diff:+.5f} +- {c.nats_se:.5f}", f"{c.nats_detectable:.5f}"]
            if bar:
                met = ["met" if c.bar_met else "not met", f"{c.bar_p:.2g}"]
        table.append([row.name, *cells, *met * bar])
    return table


def context_table(rows: list[Row]) -> Table:
    """What differs in settings, and what it costs: means over the finished seeds."""
    differ: dict[str, Any] = {}
    for row in rows[1:]:
        differ |= {k: of_base for k, (_, of_base) in row.settings.items()}
    table = [["trial", "settings", "parameters", "bytes", "ms/step", "training s"]]

    def mean(runs: Sequence[Run], value: Callable[[Run], float]) -> str:
        said = [x for run in runs if run.finished and (x := value(run)) and math.isfinite(x)]
        return f"{fmean(said):,.{0 if fmean(said) >= 1000 else 1}f}" if said else ""

    for row in rows:
        own = differ if row is rows[0] else {k: mine for k, (mine, _) in row.settings.items()}
        values = " ".join(f"{key.upper()}={own[key]}" for key in sorted(own))
        cells = [row.name, values, mean(row.runs, lambda run: run.parameters)]
        cells.append(mean(row.runs, lambda run: run.sizes.get("total", 0)))
        cells.append(mean(row.runs, lambda run: run.step_ms))
        table.append([*cells, mean(row.runs, lambda run: run.seconds.get("train", 0))])
    return table


def notes_on(rows: list[Row]) -> list[str]:
    """What must be known to trust the tables."""
    missing = [note for row in rows for note in lost(row.runs, row.score)]
    refused = [f"NOT COMPARED: {row.name}: {row.refusal}" for row in rows if row.refusal]
    found = [note for row in rows if row.comparison for note in row.comparison.notes]
    return list(dict.fromkeys([*missing, *refused, *found]))


def markdown(table: Table) -> str:
    """A table as Markdown."""
    head, *body = [[cell.replace("|", r"\|") for cell in cells] for cells in table]
    rule = ["---" if title in ("trial", "settings") else "--:" for title in head]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *body))


def document(rows: list[Row], *more: str) -> str:
    """As Markdown: the table of scores, its legend, what is given, and the notes."""
    notes = "\n".join("- " + re.sub(r"([<`*\[\]])", r"\\\1", note) for note in notes_on(rows))
    legend = LEGEND if len(rows) > 1 else ALONE
    return "\n\n".join(filter(None, [markdown(score_table(rows)), legend, *more, notes])) + "\n"


def markdown_table(runs: Sequence[Run], base: str | None = None, score: str | None = None) -> str:
    """One row a trial: its score, the difference to the base, how sure that is; and notes."""
    return document(compare_all(by_name(runs), base, score))


# ---- Command line ----


def main(argv: Sequence[str] | None = None) -> int:
    """The program; its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUNS", help="trials to compare; with --against one group")
    add("--against", nargs="+", metavar="RUNS", help="the group to compare with")
    add("--base", metavar="NAME", help="the trial to compare with: base, none, or else the first")
    add("--score", choices=list(SCORE_LINES), help="default: the last that all runs have")
    add("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    if args.against and args.base:
        parser.error("--base names a trial, --against gives another group; take one of them")
    try:
        groups = by_name(read_runs(args.runs))
        if args.against:
            sides = args.runs, args.against
            firsts = apart(*(Path(side[0]) for side in sides))
            name, args.base = (f + "..." * (len(s) > 1) for f, s in zip(firsts, sides, strict=True))
            if name == args.base:
                parser.error(f"{name} is on both sides; give a second group after --against")
            groups = {name: read_runs(args.runs), args.base: read_runs(args.against)}
        rows = compare_all(groups, args.base, args.score)
    except (RunError, CompareError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        told = [asdict(replace(row, runs=[str(run.path) for run in row.runs])) for row in rows]
        print(json.dumps(told, indent=2))
    else:
        in_nats = [markdown(nats_table(rows)), BAR_LEGEND if barred(rows) else NO_BAR]
        text = document(rows, *in_nats * (len(rows) > 1), markdown(context_table(rows)))
        print(text, end="") if not sys.stdout.isatty() else Console().print(Markdown(text))
    return int(any(row.refusal for row in rows))


if __name__ == "__main__":
    sys.exit(main())
