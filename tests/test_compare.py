"""records/compare.py: statistics against independent ones, what is refused and printed."""

import json
import math
import re
import sys
from dataclasses import replace
from html import escape
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from markdown_it import MarkdownIt
from scipy import stats

sys.path.insert(0, str(ROOT / "records"))

from compare import (
    VAL_BYTES,
    VAL_TOKENS,
    CompareError,
    compare,
    difference,
    main,
    markdown_table,
    with_last,
)
from runs import read_run, read_runs, split_name, trial_of

TOKENS, BYTES = 400_000, 1_000_000
SEEDS = (1337, 42, 7, 2024)
BASE = (1.501, 1.5032, 1.4994, 1.502)  # bits per byte by seed
BETTER = (1.4913, 1.4927, 1.4908, 1.4918)


def result(bpb, seed, tokens=TOKENS, size=BYTES):
    """A result.json with what compare.py reads."""
    scores = {}
    for name, value, stride in (("plain", bpb + 0.01, 512), ("sliding", bpb, 64)):
        loss = value * math.log(2) * size / max(tokens, 1)
        scores[name] = {"val_bpb": value, "val_loss": loss, "tokens": tokens, "bytes": size}
        scores[name] |= {"nats": loss * tokens, "stride": stride, "seconds": 1.0}
    return {
        "status": "ok",
        "settings": {"seed": seed, "vocab_size": 1024, "matrix_lr": 0.02, "run_dir": f"{bpb}"},
        "scores": scores,
        "parameters": 1_518_856,
        "bytes": {"total": 1_496_907},
        "step_ms": {"p50": 121.5},
        "machine": {"device": "cpu"},
        "code_sha256": "c0de",
        "val_sha256": "7ex7",
    }


def put(folder, values):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(values))
    return folder


def trial(folder, bpbs=BASE, seeds=SEEDS, change=None, text=(TOKENS, BYTES), **settings):
    """Writes and reads the runs of a trial; `change` edits each result, `text` is its size."""
    for bpb, seed in zip(bpbs, seeds, strict=True):
        values = result(bpb, seed, *text)
        values["settings"] |= settings
        if change:
            change(values)
        put(folder / f"seed{seed}", values)
    return read_runs([folder])


def put_log(path, bpb, seed, stride=64, tokens=TOKENS, size=BYTES):
    """A log of another script of the challenge."""
    loss = bpb * math.log(2) * size / tokens
    name = "final_int6_sliding_window"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"seed:{seed}\nval_loader:shards pattern=fineweb_val_*.bin tokens:{tokens}\n"
        f"{name} val_loss:{loss:.4f} val_bpb:{bpb:.4f} stride:{stride} eval_time:1000ms\n"
        f"{name}_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}\n"
    )
    return path


def logs(folder, bpbs=BETTER, **options):
    paths = [put_log(folder / f"a_seed{s}.log", b, s, **options) for s, b in enumerate(bpbs)]
    return read_runs(paths)


CHALLENGE = (VAL_TOKENS, VAL_BYTES)


@pytest.fixture
def sweep(tmp_path):
    """A base, a better trial, and one that is neither, whose seed 7 failed."""
    trial(tmp_path / "base", text=CHALLENGE)
    trial(tmp_path / "better", BETTER, text=CHALLENGE, matrix_lr=0.03)
    trial(tmp_path / "alike", (1.5004, 1.5039, 1.499, 1.5027), text=CHALLENGE, matrix_lr=0.025)
    reason = "rank 0:\nloss | is nan at <step> 3"
    put(tmp_path / "alike/seed7", {"status": "nan", "reason": reason, "settings": {"seed": 7}})
    return tmp_path


def tables(markdown):
    """The tables of a document as rows by column."""
    found = []
    for block in re.findall(r"(?:^\|.*\|\n?)+", markdown, re.MULTILINE):
        lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in block.strip().split("\n")]
        head, _, *rows = [[cell.strip() for cell in cells] for cells in lines]
        found.append([dict(zip(head, cells, strict=True)) for cells in rows])
    return found


def printed(capsys, *argv, status=0):
    capsys.readouterr()
    assert main([str(x) for x in argv]) == status
    return tables(capsys.readouterr().out)


def numbers(cell):
    return [float(x) for x in re.findall(r"[-+]?\d[\d.e-]*", cell)]


# ---- Statistics ----


@pytest.mark.parametrize("seeds", [SEEDS, (1, 2, 3, 4)], ids=["paired", "Welch"])
def test_a_comparison_has_the_figures_of_scipy(tmp_path, seeds):
    paired = seeds == SEEDS
    a = trial(tmp_path / "a", BETTER, seeds, text=CHALLENGE)
    c = compare(a, trial(tmp_path / "b", text=CHALLENGE))
    test = stats.ttest_rel if paired else stats.ttest_ind
    options = {} if paired else {"equal_var": False}
    nats_per_bpb = math.log(2) * VAL_BYTES / VAL_TOKENS
    assert (c.method, c.n_a, c.n_b) == ("paired t" if paired else "Welch t", 4, 4)
    for found, unit in ((c.bpb, 1.0), (c.nats, nats_per_bpb)):
        values = np.array(BETTER) * unit, np.array(BASE) * unit
        expected = test(*values, **options)
        assert found.mean == pytest.approx(np.mean(values[0]) - np.mean(values[1]))
        assert found.se == pytest.approx(found.mean / expected.statistic)
        assert (found.p, found.df) == pytest.approx((expected.pvalue, expected.df))
        interval = expected.confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    shifted = np.array(BETTER) * nats_per_bpb + 0.005, np.array(BASE) * nats_per_bpb
    record = test(*shifted, **options, alternative="less")
    assert c.record_p == pytest.approx(record.pvalue)


@pytest.mark.parametrize(
    ("a", "b", "paired"),
    [
        ([1.0, 2.0], [0.0, 0.5], True),
        ([1.0, 2.0, 4.0, 3.0, 7.0, 1.0], [0.0, 0.5, 1.0, 3.0, 1.0, 2.0], True),
        ([1.0, 2.0], [1.0, 1.3], False),  # degrees of freedom between 1 and 2
        ([1.0, 2.0, 5.0, 6.0], [1.0, 1.3, 2.0, 3.0, 5.0], False),
    ],
)
def test_the_detectable_difference_is_found_four_times_in_five(a, b, paired):
    """The power is the normal one averaged over the chi-square distribution of the variance."""
    d = difference(np.array(a), np.array(b), paired)
    rate = np.sqrt(stats.chi2.ppf((np.arange(20_000) + 0.5) / 20_000, d.df) / d.df)
    edge, shift = stats.t.isf(0.025, d.df), d.detectable / d.se
    power = stats.norm.cdf(shift - edge * rate) + stats.norm.cdf(-shift - edge * rate)
    assert power.mean() == pytest.approx(0.8, abs=2e-5)


@pytest.mark.parametrize(
    ("gain", "noise", "text", "verdict"),
    [
        (0.005, 1e-7, CHALLENGE, "no, p = "),
        (0.0051, 1e-7, CHALLENGE, "yes, p = "),
        (0.02, 0.005, CHALLENGE, "no, p = "),
        (-0.02, 1e-7, CHALLENGE, "no, p = "),
        (0.02, 1e-7, (VAL_BYTES, VAL_BYTES), ""),  # the rule is for that text and those tokens
        (0.02, 1e-7, (VAL_TOKENS, 25 * BYTES), ""),
    ],
)
def test_a_record_is_better_by_more_than_5_millinats(tmp_path, capsys, gain, noise, text, verdict):
    nats_per_bpb = math.log(2) * text[1] / text[0]
    change = (gain + noise * np.array([1, -1, 1.5, -1.5])) / nats_per_bpb
    base = trial(tmp_path / "base", text=text)
    c = compare(trial(tmp_path / "a", np.array(BASE) - change, text=text), base)
    assert c.nats.mean == pytest.approx(-gain, abs=1e-9)
    assert (c.record_p is None) == (not verdict)
    assert printed(capsys, tmp_path)[0][1].get("record", "").startswith(verdict)


# ---- Pairs ----


def test_pairs_are_made_by_seed_whatever_the_order(tmp_path):
    a, b = trial(tmp_path / "a", BETTER), trial(tmp_path / "b")
    assert compare(a[::-1], b).bpb.p == pytest.approx(compare(a, b).bpb.p)
    shuffled = trial(tmp_path / "c", BETTER, SEEDS[1:] + SEEDS[:1])
    assert compare(shuffled, b).bpb.p > 2 * compare(a, b).bpb.p


@pytest.mark.parametrize(
    ("seeds", "method", "n", "alone"),
    [
        ((1, 2, 3, 4), "Welch t", 4, []),
        ((1, 2, 3, SEEDS[3]), "Welch t", 4, []),
        ((*SEEDS[:3], 5), "paired t", 3, [2024, 5]),
        (SEEDS, "paired t", 4, []),
    ],
)
def test_two_shared_seeds_make_pairs_and_others_are_named(tmp_path, seeds, method, n, alone):
    c = compare(trial(tmp_path / "a", BETTER, seeds), trial(tmp_path / "b"))
    assert (c.method, c.n_a, c.n_b) == (method, n, n)
    assert c.notes == [f"seed {seed} is in one of a and b only" for seed in alone]


def test_a_failed_seed_does_not_change_the_test(sweep):
    alike, base = read_runs([sweep / "alike"]), read_runs([sweep / "base"])
    good = [run for run in alike if run.finished]
    for c in (compare(alike, base), compare(base, alike), compare(good, base)):
        assert (c.method, c.n_a, c.n_b) == ("paired t", 3, 3)
        assert c.bpb.p == pytest.approx(compare(good, base).bpb.p)
        assert sum("seed 7 is in one of" in note for note in c.notes) == 1
    notes = compare(alike, base).notes
    assert "NOT COUNTED: alike seed 7: nan: loss | is nan at <step> 3" in notes


def test_runs_without_a_seed_are_not_paired_and_count_beside_no_others(tmp_path):
    """Beside runs that state their seed such a run may be a copy, as train.log often is."""
    for number, bpb in enumerate(BETTER):
        put_log(tmp_path / f"a/{number}.log", bpb, "")
    base, unknown = trial(tmp_path / "base"), read_runs([tmp_path / "a"])
    unknown = [replace(run, name="a") for run in unknown]
    c = compare(unknown, base)
    assert (c.method, c.n_a, c.n_b) == ("Welch t", 4, 4)
    c = compare(trial(tmp_path / "b", BETTER[:3], SEEDS[:3]) + unknown[3:], base)
    assert (c.method, c.n_a) == ("paired t", 3)
    assert any("NOT COUNTED: a: its seed is unknown" in note for note in c.notes)


# ---- What is refused ----


def edit(*keys, seed=None, **values):
    """A change of results, or of one seed's, at a path of keys."""

    def change(result):
        if seed in (None, result["settings"]["seed"]):
            part = result
            for key in keys:
                part = part[key]
            part.update(values)

    return change


LONGER = {"step": 5, "changed": {"iterations": 9, "run_dir": "x"}}
RESUMED = edit(seed=9, train_losses=[3.1, 2.5, 2.0, 0.9])
SAME_WEIGHTS = {"float": result(1.5, 0)["scores"]["plain"]}
REFUSED = [
    ("different validation data.*sha256 07her", {"change": edit(val_sha256="07her")}),
    ("different validation data", {"change": edit(seed=7, val_sha256="07her")}),
    ("999,997 bytes.*score both on one text", {"text": (TOKENS, BYTES - 3)}),
    ("200,000 tokens, 500,000 bytes", {"text": (TOKENS // 2, BYTES // 2)}),
    ("at stride 128.*at 64.*EVAL_STRIDE", {"change": edit("scores", "sliding", stride=128)}),
    (
        "MATRIX_LR is 0.02 in a seed 1337, 0.04 in",
        {"change": edit("settings", seed=7, matrix_lr=0.04)},
    ),
    ("DATA_PATH is None in .*, b in a", {"change": edit("settings", seed=7, data_path="/a/b")}),
    ("ITERATIONS BEFORE RESUME is None in .*, 9 in", {"change": edit(seed=7, resumed=LONGER)}),
    ("several programs.*a seed 7 has sha256 07", {"change": edit(seed=7, code_sha256="07")}),
    ("only seed 1337 has a score; .* another SEED", {"bpbs": BETTER[:1], "seeds": SEEDS[:1]}),
    ("no run has a score", {"change": edit(status="failed")}),
    ("differ by the same amount", {"bpbs": [b + 2**-9 for b in BASE]}),
    # Copies, or one training that would count as two seeds.
    ("a seed 1337 and a seed 2024 have the same score", {"bpbs": (*BETTER[:3], BETTER[0])}),
    ("a seed 2024 and base seed 2024 have the same score", {"bpbs": (*BETTER[:3], BASE[3])}),
    ("a seed 1337 and a seed 2024 are one", {"change": edit(train_losses=[3.0, 2.5, 2.0])}),
    ("quantized again: their losses are equal", {"change": edit("scores", **SAME_WEIGHTS)}),
    ("a seed 9 and base seed 42 are one", {"seeds": (*SEEDS[:3], 9), "change": RESUMED}),
]


@pytest.mark.parametrize(("message", "options"), REFUSED)
def test_groups_that_cannot_be_compared(tmp_path, capsys, message, options):
    base = trial(tmp_path / "base", change=edit(seed=42, train_losses=[3.1, 2.5, 2.0, 1.0]))
    trial(tmp_path / "good", BETTER)
    faulty = trial(tmp_path / "a", **{"bpbs": BETTER} | options)
    with pytest.raises(CompareError, match=message):
        compare(faulty, base)
    with pytest.raises(CompareError):
        compare(base, faulty)
    assert main([str(tmp_path)]) == 1
    text = capsys.readouterr().out  # goes into README files
    assert "- NOT COMPARED: a: " in text and str(tmp_path) not in text
    assert tables(text)[0][-1]["p"]  # the other trial is compared


def test_the_score_is_one_that_all_runs_have(tmp_path):
    def drop(name):
        return lambda values: values["scores"].pop(name)

    base, lacking = trial(tmp_path / "b"), trial(tmp_path / "a", BETTER, change=drop("sliding"))
    c = compare(lacking, base)
    assert c.score == "plain"
    assert c.notes == ["compared by plain, but some runs have sliding: see --score last"]
    assert compare(base, trial(tmp_path / "c", BETTER)).score == "sliding"
    with pytest.raises(CompareError, match=r"the score sliding: .*; a seed 1337 has plain;"):
        compare(lacking, base, "sliding")
    with pytest.raises(CompareError, match="a common score"):
        compare(lacking, trial(tmp_path / "d", BETTER, change=drop("plain")))


def test_scores_of_different_passes(tmp_path, capsys):
    """TTT_ENABLED has no effect on the scores that all have; `last` compares what it changes."""

    def with_ttt(gain):
        def change(values):
            score = values["scores"]["sliding"]
            factor = 1 - gain * (1 + values["settings"]["seed"] / 1e5)
            scaled = {key: score[key] * factor for key in ("val_bpb", "val_loss", "nats")}
            values["scores"]["ttt"] = score | scaled | {"stride": 32}

        return change

    trial(tmp_path / "base")
    trial(tmp_path / "better", BETTER, matrix_lr=0.03)
    trial(tmp_path / "ttt", change=with_ttt(0.01), ttt_enabled=True)
    plain, last = (printed(capsys, tmp_path, *more)[0] for more in ([], ["--score", "last"]))
    assert plain[2]["difference to base"] == "equal" and plain[1]["p"] == plain[1]["p (Holm)"]
    assert numbers(last[2]["difference to base"])[0] == pytest.approx(-0.015, abs=2e-3)
    main([str(tmp_path)])
    out = capsys.readouterr().out
    assert "- EQUAL: ttt: each seed has the same score (sliding) as in base: what differs" in out
    assert "has no effect on it: TTT_ENABLED; --score last compares ttt with sliding" in out
    main([str(tmp_path), "--score", "last"])
    assert "- the ways of scoring differ: ttt by ttt, base by sliding" in capsys.readouterr().out
    one = read_runs([tmp_path / "ttt/seed42", tmp_path / "base/seed7"])
    with pytest.raises(CompareError, match="SEED only"):
        compare(*[with_last(replace(r, settings={"seed": r.seed}) for r in one)] * 2, "last")


def test_two_tokenizers_are_compared_in_bits_per_byte_only(tmp_path, capsys):
    def other(values):
        values["val_sha256"] = "b17e5"
        values["scores"]["sliding"]["stride"] = 128  # in other units

    base = trial(tmp_path / "base")
    good = compare(trial(tmp_path / "good", BETTER), base)
    c = compare(trial(tmp_path / "bytes", BETTER, text=(BYTES, BYTES), change=other), base)
    assert c.bpb == good.bpb
    assert c.nats is c.record_p is None
    assert "two tokenizers: only bits per byte can be compared" in c.notes
    row = printed(capsys, tmp_path / "bytes", "--against", tmp_path / "base")[0][1]
    assert row["difference in nats"] == "not comparable"
    group = logs(tmp_path / "logs", BETTER[:3])
    group.append(read_run(put_log(tmp_path / "a_seed9.log", BETTER[3], 9, tokens=BYTES)))
    with pytest.raises(CompareError, match="two tokenizers"):
        compare(group, base)


def test_the_end_of_the_challenges_text_may_be_missing(tmp_path):
    """Other scripts score whole windows only."""
    base = trial(tmp_path / "base", text=CHALLENGE, change=lambda x: x.update(val_sha256=""))
    c = compare(logs(tmp_path, tokens=VAL_TOKENS - 213, size=VAL_BYTES - 519), base)
    assert c.nats.mean < 0
    with pytest.raises(CompareError, match="different validation data"):
        compare(logs(tmp_path, tokens=VAL_TOKENS, size=VAL_BYTES - 50_000), base)


# ---- Logs ----


def test_logs_compare_as_run_folders_do(tmp_path):
    base = trial(tmp_path / "base", seeds=range(4), text=CHALLENGE)
    good = compare(trial(tmp_path / "good", BETTER, range(4), text=CHALLENGE), base)
    c = compare(logs(tmp_path, tokens=VAL_TOKENS, size=VAL_BYTES), base)
    assert c.method == "paired t"
    for name in ("p", "mean", "se", "low", "high", "detectable"):
        assert getattr(c.bpb, name) == pytest.approx(getattr(good.bpb, name), rel=1e-4), name
    assert any("a log has no settings" in note for note in c.notes)
    base = trial(tmp_path / "b")
    assert compare(logs(tmp_path, stride=0), base).bpb.p < 0.01
    for path in tmp_path.glob("*.log"):  # what it does not state is unknown, not different
        path.write_text(path.read_text().replace("val_loader", "loader"))
    c = compare(read_runs([tmp_path / f"a_seed{seed}.log" for seed in range(4)]), base)
    assert c.nats and any("a seed 0 does not state its validation tokens" in x for x in c.notes)
    assert good.notes == []


def test_logs_of_a_folder_are_trials_by_name(tmp_path, capsys):
    for name, bpbs in (("plain", BETTER), ("none", BASE), ("seed_test", np.array(BETTER) + 0.1)):
        for seed, bpb in zip(SEEDS, bpbs, strict=True):
            put_log(tmp_path / f"train_{name}_seed{seed}.log", bpb, seed)
    rows = printed(capsys, tmp_path)[0]
    assert [row["trial"] for row in rows] == ["none", "plain", "seed_test"]
    assert {row["seeds"] for row in rows} == {"4"}


@pytest.mark.parametrize(
    ("path", "trial", "seed"),
    [
        ("logs/seed_test", "seed_test", None),
        ("logs/base/seed-7", "base", 7),
        ("logs/base/seed7/train.log", "base", None),
        ("2026-03-25_Theirs/train_seed42.log", "2026-03-25_Theirs", 42),
        ("x/train_MUON_WD=0.1+seed_test_seed42.log", "MUON_WD=0.1+seed_test", 42),
        ("x/training_seed_3.txt", "training", 3),
    ],
)
def test_trial_and_seed_by_name(path, trial, seed):
    assert (trial_of(Path(path)), split_name(Path(path))[1]) == (trial, seed)


# ---- What is printed ----


def test_a_sweep_against_its_base(sweep, capsys):
    scores, context = printed(capsys, sweep)
    base, *others = scores
    assert [row["trial"] for row in scores] == ["base", "alike", "better"]
    assert [row["seeds"] for row in scores] == ["4", "3 of 4", "4"]
    assert numbers(base["bpb, sliding"]) == [1.5014, pytest.approx(np.std(BASE, ddof=1), abs=5e-6)]
    assert {*list(base.values())[3:]} == {""}
    for row in others:
        c = compare(read_runs([sweep / row["trial"]]), read_runs([sweep / "base"]))
        near = lambda *values: pytest.approx(values, abs=5e-6)  # noqa: E731
        assert numbers(row["difference to base"]) == near(c.bpb.mean, c.bpb.se)
        assert numbers(row["95 % interval"]) == near(c.bpb.low, c.bpb.high)
        assert numbers(row["detectable"]) == near(c.bpb.detectable)
        assert numbers(row["difference in nats"]) == near(c.nats.mean, c.nats.se)
        assert numbers(row["p"]) == [pytest.approx(c.bpb.p, rel=0.05)]
        assert numbers(row["record"]) == [pytest.approx(c.record_p, rel=0.05)]
        assert row["test"] == "paired t"
    assert numbers(others[1]["p (Holm)"])[0] == pytest.approx(2 * c.bpb.p, rel=0.05)
    assert [row["settings"] for row in context] == [f"MATRIX_LR={x}" for x in (0.02, 0.025, 0.03)]
    assert {(row["bytes"], row["ms/step"]) for row in context} == {("1,496,907", "121.5")}
    main([str(sweep)])
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("- ")]
    assert notes == [
        r"- NOT COUNTED: alike seed 7: nan: loss \| is nan at \<step> 3",
        "- seed 7 is in one of alike and base only",
    ]


def test_trials_that_wait_or_were_killed_or_damaged_are_named(sweep):
    for run in ("better/seed99", "base/seed99", "better.cut1/seed5.cut1", "better/seed42"):
        (sweep / run).mkdir(parents=True, exist_ok=True)
        (sweep / run / "command.sh").write_text("true\n")
    put_log(sweep / "base/seed99/train.log", 1.3, 99)  # killed between two scores
    (sweep / "better/seed42/result.json").write_text('{"status": "o')
    text = markdown_table(read_runs([sweep]))
    seeds = [(row["trial"], row["seeds"]) for row in tables(text)[0]]
    assert seeds == [("base", "4 of 5"), ("alike", "3 of 4"), ("better", "3 of 5")]
    assert "NOT COUNTED: base seed 99: cut off" in text
    assert "NOT COUNTED: better seed 99: waiting" in text
    assert "NOT COUNTED: better seed 42: failed: not a run: " in text
    assert str(sweep) not in text


def test_limits_machines_and_programs_that_differ_are_named(tmp_path):
    def change(values):
        values |= {"status": "over a limit", "verdicts": {"a": "PASS", "total_bytes": "FAIL"}}
        values |= {"machine": {"device": "gpu"}, "code_sha256": "07her"}
        values["resumed"] = LONGER

    notes = compare(trial(tmp_path / "a", BETTER, change=change), trial(tmp_path / "b")).notes
    assert "a seed 7 is over a limit: total_bytes" in notes
    assert "a seed 7 was resumed from a run with ITERATIONS=9" in notes
    assert {"not all runs have the same program", "not all runs have the same machine"} < {*notes}


def test_the_base_is_base_or_none_or_the_first_or_as_named(tmp_path, capsys):
    def base(*argv):
        return list(printed(capsys, tmp_path, *argv)[0][0])[3]

    trial(tmp_path / "b", BETTER)
    trial(tmp_path / "c", BASE)
    assert base() == "difference to b"
    trial(tmp_path / "none", np.add(BASE, [1e-4, 2e-4, 3e-4, 5e-4]), matrix_lr=0.1)
    assert base() == "difference to none"
    trial(tmp_path / "base", np.add(BASE, [1e-3, 2e-3, 3e-3, 5e-3]), matrix_lr=0.2)
    assert base() == "difference to base"
    assert base("--base", "c") == "difference to c"


@pytest.mark.parametrize("seeds", [4, 1])
def test_one_trial_alone_is_a_row(tmp_path, capsys, seeds):
    trial(tmp_path / "base", BASE[:seeds], SEEDS[:seeds])
    score = "1.50140 +- 0.00161" if seeds == 4 else "1.50100"
    row = {"trial": "base", "seeds": str(seeds), "bpb, sliding": score}
    assert printed(capsys, tmp_path)[0] == [row]
    assert main([str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["comparison"] is None
    put(tmp_path / "base/seed5", result(1.5, 5) | {"code_sha256": "07her"})
    assert main([str(tmp_path)]) == 2
    assert "several programs" in capsys.readouterr().err


def test_the_training_data_is_a_setting_and_its_folder_is_not(tmp_path, capsys):
    trial(tmp_path / "none", data_path="/here/fineweb10B_sp1024")
    trial(tmp_path / "a", BETTER, data_path="/here/bench_sp1024")
    trial(tmp_path / "b", [1.492, 1.493, 1.494, 1.5], data_path="./fineweb10B_sp1024/")
    context = printed(capsys, tmp_path)[1]
    settings = [row["settings"] for row in context]
    assert settings == ["DATA_PATH=fineweb10B_sp1024", "DATA_PATH=bench_sp1024", ""]


def test_two_groups(sweep, capsys):
    rows = printed(capsys, sweep / "better", "--against", sweep / "base")[0]
    assert [Path(row["trial"]).name for row in rows] == ["base", "better"]
    sides = [[sweep / name / f"seed{s}" for s in SEEDS] for name in ("better", "base")]
    by_runs = printed(capsys, *sides[0], "--against", *sides[1])[0]
    assert [*by_runs[1].values()][3:] == [*rows[1].values()][3:]
    back = printed(capsys, sweep / "base", "--against", sweep / "better")[0][1]
    assert numbers(back[f"difference to {sweep}/better"])[0] > 0 and back["record"][:2] == "no"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["base", "--base", "none"], "no trial is named none; choose --base among base, or"),
        (["nowhere"], "nowhere: it has no result.json"),
        (["better", "--against", "base", "--score", "ttt"], "not all runs have the score ttt"),
        (["lone", "--against", "base"], "lone cannot be compared .*: only seed 1337 has a score"),
        (["better", "base", "--against", "alike"], "a seed is twice in one group"),
        (["base", "--against", "base"], "base is on both sides; give another group"),
    ],
)
def test_what_cannot_be_compared_is_an_error(sweep, capsys, monkeypatch, argv, message):
    trial(sweep / "lone", BETTER[:2], SEEDS[:2])
    put(sweep / "lone/seed42", {"status": "oom", "reason": "lower MICRO_BATCH_TOKENS"})
    monkeypatch.chdir(sweep)
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ")
    assert re.search(message, captured.err)
    if "lone" in argv:  # the failed run is not hidden by the refusal
        assert "NOT COUNTED: lone seed 42: oom: lower MICRO_BATCH_TOKENS" in captured.err


@pytest.mark.parametrize(
    "name", ["a|b", "[red]x", "_x_ <b>", "*`[a](b)`*", "a\\|b", "x\ny", "~~x~~ &lt; $y$"]
)
def test_a_name_is_no_markup(tmp_path, capsys, monkeypatch, name):
    trial(tmp_path / name, BETTER)
    runs = [*trial(tmp_path / "base"), *read_runs([tmp_path / name])]
    name = name.replace("\n", " ")
    html = MarkdownIt("commonmark").enable("table").render(markdown_table(runs))
    assert f"<td>{escape(name, quote=False)}</td>" in html
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main([str(tmp_path)]) == 0
    out = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    assert re.search(rf"^ *{re.escape(name)} +4 +1\.49165 \+- 0\.\d+", out, re.MULTILINE)


def test_json(sweep, capsys):
    assert main([str(sweep), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert [row["name"] for row in rows] == ["base", "alike", "better"]
    assert rows[0]["comparison"] is None
    assert rows[0]["runs"][0] == str(sweep / "base/seed1337")
    c = compare(read_runs([sweep / "better"]), read_runs([sweep / "base"]))
    better = rows[2]["comparison"]
    assert (better["bpb"]["p"], better["p_holm"]) == (c.bpb.p, 2 * c.bpb.p)
    assert better["settings"] == {"matrix_lr": [0.03, 0.02]}
