"""records/compare.py: its statistics against others' and by simulation, what it refuses, says."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from scipy import stats

sys.path.insert(0, str(ROOT / "records"))

import compare as program
from compare import CompareError, compare, detectable, holm, main, markdown_table, t_test
from runs import read_run, read_runs, split_name, trial_of

TOKENS, BYTES = 400_000, 1_000_000
SEEDS = (1337, 42, 7, 2024)
BASE = (1.501, 1.5032, 1.4994, 1.502)  # bits per byte by seed
BETTER = (1.4913, 1.4927, 1.4908, 1.4918)  # by 0.00975, which is 0.0169 nats a token


def nats(bpb: float, tokens: int = TOKENS, size: int = BYTES) -> float:
    return bpb * math.log(2) * size / max(tokens, 1)


def result(bpb: float, seed: int, tokens: int = TOKENS, size: int = BYTES) -> dict:
    """The least that result.json says of a run."""
    score = {"tokens": tokens, "bytes": size, "seconds": 1.0}
    plain = {"val_bpb": bpb + 0.01, "val_loss": nats(bpb + 0.01, tokens, size), "stride": 512}
    sliding = {"val_bpb": bpb, "val_loss": nats(bpb, tokens, size), "stride": 64}
    return {
        "status": "ok",
        "settings": {"seed": seed, "vocab_size": 1024, "matrix_lr": 0.02, "run_dir": f"{bpb}"},
        "scores": {"plain": score | plain, "sliding": score | sliding},
        "parameters": 1_518_856,
        "bytes": {"total": 1_496_907},
        "step_ms": {"p50": 121.5},
        "seconds": {"train": 152.7},
        "machine": {"device": "cpu"},
        "code_sha256": "c0de",
        "val_sha256": "7ex7",
    }


def put(folder: Path, told: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(told))
    return folder


def put_log(
    path: Path, bpb: float, seed: int, stride: int = 64, tokens: int = TOKENS, size: int = BYTES
) -> Path:
    """A log of another script of the challenge."""
    loss = nats(bpb, tokens, size)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"seed:{seed}\nval_loader:shards pattern=fineweb_val_*.bin tokens:{tokens}\n"
        f"final_int6_sliding_window val_loss:{loss:.4f} val_bpb:{bpb:.4f} stride:{stride} "
        f"eval_time:1000ms\nfinal_int6_sliding_window_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}\n"
    )
    return path


def trial(folder: Path, bpbs=BASE, seeds=SEEDS, change=lambda told: None, **settings) -> list:
    """The runs of a trial, changed each by a function, its settings by name."""
    for bpb, seed in zip(bpbs, seeds, strict=True):
        told = result(bpb, seed)
        told["settings"] |= settings
        change(told)
        put(folder / f"seed{seed}", told)
    return read_runs([folder])


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """A base, a better trial, and one that is neither, whose seed 7 failed."""
    trial(tmp_path / "base", change=challenge)
    trial(tmp_path / "better", BETTER, change=challenge, matrix_lr=0.03)
    alike = (1.5004, 1.5039, 1.499, 1.5027)
    trial(tmp_path / "alike", alike, change=challenge, matrix_lr=0.025)
    told = {
        "status": "nan",
        "reason": "rank 0:\nloss | is nan at <step> 3",
        "settings": {"seed": 7},
    }
    put(tmp_path / "alike" / "seed7", told)
    return tmp_path


def tables(markdown: str) -> list[list[dict[str, str]]]:
    """Its tables as rows by column."""
    found = []
    for block in re.findall(r"(?:^\|.*\|\n?)+", markdown, re.MULTILINE):
        lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in block.strip().split("\n")]
        head, rule, *rows = [[cell.strip() for cell in cells] for cells in lines]
        texts = ("trial", "settings")
        assert rule == [
            "---" if title in texts else "--:" for title in head
        ]  # figures to the right
        assert {len(cells) for cells in rows} == {len(head)} == {len(rule)}
        found.append([dict(zip(head, cells, strict=True)) for cells in rows])
    return found


# ---- Statistics ----


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("null", [0.0, -0.005])
def test_t_tests_are_those_of_scipy(paired, null):
    rng = np.random.default_rng(1)
    for n, m in [(2, 2), (3, 3), (5, 5), (8, 8), *([] if paired else [(2, 9), (6, 3)])]:
        a, b = rng.normal(1.0, 0.004, (20, n)), rng.normal(1.003, 0.001, (20, m))
        diff, se, df, two, less = t_test(a, b, paired, null)
        test = (
            stats.ttest_rel if paired else lambda *x, **k: stats.ttest_ind(*x, equal_var=False, **k)
        )
        both = test(a - null, b, axis=-1)
        one = test(a - null, b, axis=-1, alternative="less")
        exactly = {"rtol": 1e-12, "atol": 0}
        np.testing.assert_allclose(diff, a.mean(-1) - b.mean(-1), **exactly)
        np.testing.assert_allclose((diff - null) / se, both.statistic, rtol=1e-11)
        np.testing.assert_allclose(np.broadcast_to(df, 20), both.df, **exactly)
        np.testing.assert_allclose(two, both.pvalue, rtol=1e-11)
        np.testing.assert_allclose(less, one.pvalue, rtol=1e-11)


@pytest.mark.parametrize("seeds", [SEEDS, (1, 2, 3, 4)], ids=["paired", "Welch"])
def test_a_comparison_has_the_figures_of_scipy(tmp_path, seeds):
    a = trial(tmp_path / "a", BETTER, seeds, challenge)
    b, paired = trial(tmp_path / "b", change=challenge), seeds == SEEDS
    c = compare(a, b)
    bpb = [np.array([run.scores["sliding"].val_bpb for run in side]) for side in (a, b)]
    loss = [np.array([run.scores["sliding"].val_loss for run in side]) for side in (a, b)]
    assert sorted(bpb[0]) == sorted(BETTER)
    if paired:
        test, bar = (
            stats.ttest_rel(*bpb),
            stats.ttest_rel(loss[0] + 0.005, loss[1], alternative="less"),
        )
    else:
        test = stats.ttest_ind(*bpb, equal_var=False)
        bar = stats.ttest_ind(loss[0] + 0.005, loss[1], equal_var=False, alternative="less")
    interval = test.confidence_interval(0.95)
    nats_of = math.log(2) * program.VAL_BYTES / program.VAL_TOKENS
    assert (c.method, c.n_a, c.n_b) == ("paired t" if paired else "Welch t", 4, 4)
    close = {"rel": 1e-12}
    assert c.bpb_diff == pytest.approx(np.mean(BETTER) - np.mean(BASE), **close)
    assert c.bpb_diff < 0
    assert c.df == pytest.approx(test.df, **close)
    assert c.bpb_se == pytest.approx(c.bpb_diff / test.statistic, **close)
    assert (c.p, c.low, c.high) == pytest.approx((test.pvalue, *interval), **close)
    assert c.nats_diff == pytest.approx(c.bpb_diff * nats_of, rel=1e-9)
    assert c.nats_se == pytest.approx(c.bpb_se * nats_of, rel=1e-9)
    assert c.detectable == detectable(c.bpb_se, c.df)
    assert c.nats_detectable == pytest.approx(c.detectable * nats_of, rel=1e-9)
    assert c.bar_p == pytest.approx(bar.pvalue, rel=1e-11)
    assert c.bar_met is True
    assert c.settings == {}


def test_the_bar_is_half_a_hundredth_of_a_nat_and_p_below_a_hundredth(tmp_path):
    """A gain of 0.005 at the smallest of p's does not do, nor a large one at p = 0.02."""
    base = trial(tmp_path / "base", change=challenge)
    per_bpb = nats(1.0, program.VAL_TOKENS, program.VAL_BYTES)
    for name, gain, noise, met in [
        ("just", 0.005, 1e-7, False),
        ("more", 0.0051, 1e-7, True),
        ("large", 0.02, 1e-7, True),
        ("unsure", 0.02, 0.005, False),
        ("worse", -0.02, 1e-7, False),
    ]:
        bpbs = [
            b - (gain + noise * e) / per_bpb for b, e in zip(BASE, (1, -1, 1.5, -1.5), strict=True)
        ]
        c = compare(trial(tmp_path / name, bpbs, change=challenge), base)
        assert c.bar_met is met, name
        assert c.nats_diff == pytest.approx(-gain, abs=1e-9)
        assert (c.bar_p < 0.01) is met
        assert c.p < 0.05  # all do differ
    assert compare(base, trial(tmp_path / "b", BETTER, change=challenge)).bar_p > 0.999


@pytest.mark.parametrize(
    ("tokens", "size"),
    [(TOKENS, BYTES), (program.VAL_BYTES, program.VAL_BYTES), (program.VAL_TOKENS, BYTES * 25)],
    ids=["another text", "another vocabulary", "as many tokens"],
)
def test_the_bar_is_of_the_challenges_text_and_tokens(tmp_path, capsys, tokens, size):
    a = trial(tmp_path / "a", BETTER, change=vocabulary(tokens, "7ex7", size))
    c = compare(a, trial(tmp_path / "none", change=vocabulary(tokens, "7ex7", size)))
    assert c.nats_diff < 0
    assert c.bar_p is c.bar_met is None
    _, in_nats, _ = shown(capsys, tmp_path)
    assert [*in_nats[0]] == ["trial", "nats less none", "visible"]
    main([str(tmp_path)])
    assert "The bar of a record, 0.005 nats a token, does not apply" in capsys.readouterr().out


@pytest.mark.parametrize("paired", [True, False])
def test_p_agrees_with_permutations(paired):
    """All sign flips of pairs, or all exchanges between two groups: no normal law in them."""
    rng, pairs = np.random.default_rng(2), []
    for shift in np.linspace(0, 2.5, 12):
        seed = rng.normal(0, 1, 8)
        a, b = rng.normal(shift, 1, 8) + seed, rng.normal(0, 1, 8) + seed
        if not paired:
            a, b = rng.normal(shift, 1, 6), rng.normal(0, 1, 7)
        permuted = stats.permutation_test(
            (a, b),
            lambda x, y, axis: x.mean(axis) - y.mean(axis),
            permutation_type="samples" if paired else "independent",
            vectorized=True,
            n_resamples=10_000,  # more than there are, so all are taken
        )
        pairs.append((t_test(a, b, paired)[3], permuted.pvalue))
    mine, exact = np.array(pairs).T
    assert exact.min() < 0.02 < 0.3 < exact.max()
    assert abs(mine - exact).max() < 0.05
    assert abs(mine - exact).mean() < 0.015


def share(hits: np.ndarray) -> float:
    return float(hits.mean())


def bound(rate: float, count: int = 10_000) -> float:
    """Four standard deviations of a share."""
    return 4 * math.sqrt(rate * (1 - rate) / count)


def noise(seed: int, n: int, m: int, paired: bool) -> tuple[np.ndarray, np.ndarray]:
    """10,000 experiments without a difference; seeds that a pair shares vary twice as much."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(1.1, 0.001, (10_000, n)), rng.normal(1.1, 0.001, (10_000, m))
    common = rng.normal(0, 0.002, (10_000, n)) if paired else 0
    return a + common, b + common


@pytest.mark.parametrize("n", [3, 5, 8])
def test_false_positives_of_pairs(n):
    p = t_test(*noise(n, n, n, True), True)[3]
    for level in (0.05, 0.01):
        assert share(p < level) == pytest.approx(level, abs=bound(level))
    assert stats.kstest(p, "uniform").pvalue > 0.001


@pytest.mark.parametrize(("n", "m", "at_5", "at_1"), [(3, 3, 0.036, 0.0056), (5, 5, 0.045, 0.0080)])
def test_false_positives_of_two_groups(n, m, at_5, at_1):
    """Welch's test is careful with few seeds: below its level, never above."""
    p = t_test(*noise(n, n, m, False), False)[3]
    for level, known in ((0.05, at_5), (0.01, at_1)):
        assert share(p < level) < level + bound(level)
        assert share(p < level) == pytest.approx(known, abs=bound(level))


@pytest.mark.parametrize(("n", "m"), [(10, 10), (5, 10), (20, 8)])
def test_false_positives_of_larger_groups(n, m):
    a, b = noise(n + m, n, m, False)
    p = t_test(1.1 + (a - 1.1) * 3, b, False)[3]  # of unequal spread
    for level in (0.05, 0.01):
        assert share(p < level) == pytest.approx(level, abs=bound(level))


@pytest.mark.parametrize(("n", "paired"), [(3, True), (5, True), (10, False)])
def test_false_positives_of_the_bar(n, paired):
    """At an improvement of exactly 0.005 one in a hundred passes, below it fewer, above more."""
    a, b = noise(10 * n, n, n, paired)
    passed = [share(t_test(a - gain, b, paired, -0.005)[4] < 0.01) for gain in (0.004, 0.005, 0.02)]
    assert passed[1] == pytest.approx(0.01, abs=bound(0.01))
    assert passed[0] < passed[1] / 2
    assert passed[2] > 0.8


@pytest.mark.parametrize(("n", "paired"), [(2, True), (3, True), (5, True), (8, True), (5, False)])
def test_the_smallest_visible_difference_is_seen_four_times_in_five(n, paired):
    sd = 0.001 * math.sqrt(2)  # of the difference of one pair
    effect = detectable(sd / math.sqrt(n), n - 1 if paired else 2 * n - 2)
    a, b = noise(100 + n, n, n, paired)
    power = [share(t_test(a + e, b, paired)[3] < 0.05) for e in (0, effect / 2, effect, -effect)]
    assert power[2] == pytest.approx(0.8, abs=0.02 if paired else 0.03)
    assert power[3] == pytest.approx(0.8, abs=0.02 if paired else 0.03)
    assert power[0] < 0.06 < power[1] < 0.5


def test_the_smallest_visible_difference_by_known_values():
    normal = stats.norm.isf(0.025) + stats.norm.isf(0.2)
    assert detectable(1.0, 1e7) == pytest.approx(normal, rel=1e-5)
    for df in (1, 1.3, 2, 4, 7.7):  # by mean over the chi-square law of the variance
        rate = np.sqrt(stats.chi2.ppf((np.arange(20_000) + 0.5) / 20_000, df) / df)
        edge, shift = stats.t.isf(0.025, df), detectable(1.0, df)
        power = stats.norm.cdf(shift - edge * rate) + stats.norm.cdf(-shift - edge * rate)
        assert power.mean() == pytest.approx(0.8, abs=1e-5)
    assert detectable(0.002, 4) == pytest.approx(2 * detectable(0.001, 4))


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.2, 0.9, 0.6]) == pytest.approx([0.6, 1.0, 1.0])
    assert holm([0.03]) == [0.03]
    assert holm([]) == []


def test_holm_holds_the_level_of_a_table():
    p = np.random.default_rng(3).uniform(size=(10_000, 4))
    wrong = np.array([min(holm(row)) < 0.05 for row in p.tolist()])
    assert share(wrong) == pytest.approx(0.05, abs=bound(0.05))
    assert share(p.min(1) < 0.05) > 0.15


# ---- Pairs ----


def test_pairs_are_made_by_seed_whatever_the_order(tmp_path):
    a, b = trial(tmp_path / "a", BETTER), trial(tmp_path / "b")
    assert compare(a[::-1], b).p == pytest.approx(compare(a, b).p, rel=1e-12)
    shuffled = trial(tmp_path / "c", BETTER, SEEDS[1:] + SEEDS[:1])
    assert compare(shuffled, b).p > 2 * compare(a, b).p


def test_other_seeds_are_no_pairs(tmp_path):
    b = trial(tmp_path / "b")
    none = compare(trial(tmp_path / "none", BETTER, (1, 2, 3, 4)), b)
    one = compare(trial(tmp_path / "one", BETTER, (1, 2, 3, SEEDS[3])), b)
    for c in (none, one):
        assert (c.method, c.n_a, c.n_b) == ("Welch t", 4, 4)
        assert c.notes == []


def test_seeds_of_one_side_alone_are_left_out_and_named(tmp_path):
    a = trial(tmp_path / "a", BETTER, (*SEEDS[:3], 5))
    c = compare(a, trial(tmp_path / "b"))
    assert (c.method, c.n_a, c.n_b) == ("paired t", 3, 3)
    assert c.notes == [f"the pairs of a and b are without seed {seed}" for seed in (5, 2024)]


def test_two_pairs_are_the_least(tmp_path):
    c = compare(
        trial(tmp_path / "a", BETTER[:2], SEEDS[:2]), trial(tmp_path / "b", BASE[:2], SEEDS[:2])
    )
    assert (c.method, c.n_a, c.df) == ("paired t", 2, 1)
    assert 0 < c.detectable < math.inf


def test_a_failed_seed_does_not_change_the_test(sweep):
    alike, base = read_runs([sweep / "alike"]), read_runs([sweep / "base"])
    for c in (compare(alike, base), compare(base, alike)):
        assert (c.method, c.n_a, c.n_b) == ("paired t", 3, 3)
        assert sum("are without seed 7" in note for note in c.notes) == 1
        assert sum("alike seed 7: nan: loss | is nan at <step> 3" in note for note in c.notes) == 1
    three = [run for run in base if run.seed != 7]
    good = [run for run in alike if run.finished]
    assert compare(alike, base).p == compare(good, three).p
    unsaid = compare(good, base)  # as if the folder of the failed seed were not given
    assert (unsaid.method, unsaid.p) == ("paired t", compare(alike, base).p)
    assert unsaid.notes == ["the pairs of alike and base are without seed 7"]


def test_of_a_run_without_a_number_only_the_note_remains(tmp_path):
    def spoil(told: dict) -> None:
        if told["settings"]["seed"] == 42:
            told["scores"]["sliding"]["val_loss"] = math.nan

    c = compare(trial(tmp_path / "a", BETTER, change=spoil), trial(tmp_path / "b"))
    assert c.n_a == c.n_b == 3
    assert any(re.search("seed 42: no finite score", note) for note in c.notes)
    assert math.isfinite(c.p)


def test_groups_that_lost_each_others_seeds_have_no_pairs(tmp_path):
    def lose(*seeds: int) -> object:
        return lambda told: told.update(
            {"status": "failed"} if told["settings"]["seed"] in seeds else {}
        )

    a = trial(tmp_path / "a", BETTER, change=lose(*SEEDS[:2]))
    b = trial(tmp_path / "b", change=lose(*SEEDS[2:]))
    c = compare(a, b)
    assert (c.method, c.n_a, c.n_b) == ("Welch t", 2, 2)
    assert not any("pairs" in note for note in c.notes)


def test_a_seed_lost_on_both_sides_leaves_pairs(tmp_path):
    def spoil(told: dict) -> None:
        if told["settings"]["seed"] == 42:
            told |= {"status": "oom", "reason": "too large", "scores": {}}

    c = compare(trial(tmp_path / "a", BETTER, change=spoil), trial(tmp_path / "b", change=spoil))
    assert (c.method, c.n_a, c.n_b) == ("paired t", 3, 3)
    assert len([note for note in c.notes if "oom: too large" in note]) == 2


# ---- What is refused, beside its twin that is not ----


def challenge(told: dict) -> None:
    """As scored on the challenge's text in its tokens, so that its bar applies."""
    for score in told["scores"].values():
        score |= {"tokens": program.VAL_TOKENS, "bytes": program.VAL_BYTES}
        score["val_loss"] = nats(score["val_bpb"], program.VAL_TOKENS, program.VAL_BYTES)


def vocabulary(tokens: int, sha: str, size: int = BYTES) -> object:
    def change(told: dict) -> None:
        told["settings"]["vocab_size"] = 260
        told["val_sha256"] = sha
        for score in told["scores"].values():
            score |= {"tokens": tokens, "bytes": size}
            score["val_loss"] = nats(score["val_bpb"], tokens, size)

    return change


def each(**values: object) -> object:
    return lambda told: told.update(values)


def stride(told: dict) -> None:
    told["scores"]["sliding"]["stride"] = 128


def no_sliding(told: dict) -> None:
    del told["scores"]["sliding"]


def setting_of_one(told: dict) -> None:
    if told["settings"]["seed"] == 7:
        told["settings"]["matrix_lr"] = 0.04


def data_of_one(told: dict) -> None:
    corpus = "bench" if told["settings"]["seed"] == 7 else "fineweb10B"
    told["settings"]["data_path"] = f"/data/{corpus}_sp1024"


def program_of_one(told: dict) -> None:
    if told["settings"]["seed"] == 7:
        told["code_sha256"] = "07her"


REFUSED = {
    "other text": ({"change": each(val_sha256="07her")}, "different validation data.*sha256 07her"),
    "other text, other size": (
        {"change": vocabulary(TOKENS, "", BYTES - 3)},
        "different validation data.*999,997 bytes.*score both on one text",
    ),
    "as many tokens, without a hash": (
        {"change": vocabulary(TOKENS + 1, "", BYTES + 1)},
        "400,001 tokens",
    ),
    "as many bytes and one hash, half the tokens": (
        {"change": vocabulary(TOKENS // 2, "7ex7")},
        "different validation data.*200,000 tokens",
    ),
    "one hash, half the text": (
        {"change": vocabulary(TOKENS // 2, "7ex7", BYTES // 2)},
        "different validation data.*200,000 tokens, 500,000 bytes, sha256 7ex7",
    ),
    "other training data of one run": (
        {"change": data_of_one},
        "DATA_PATH is fineweb10B_sp1024 in a seed 1337, bench_sp1024 in a seed 7: .* SEED alone",
    ),
    "another program of one run": (
        {"change": program_of_one},
        "several programs, a seed 7 of sha256 07her.*, a seed 1337 of sha256 c0de: run all",
    ),
    "other stride": ({"change": stride}, "at stride 128.*at 64.*EVAL_STRIDE"),
    "a setting of one run": (
        {"change": setting_of_one},
        "MATRIX_LR is 0.02 in a seed 1337, 0.04 in a seed 7: .* SEED alone",
    ),
    "one seed": (
        {"bpbs": BETTER[:1], "seeds": SEEDS[:1]},
        "one run with a score, seed 1337, of 1: .* another SEED",
    ),
    "a copy": (
        {"bpbs": (*BETTER[:3], BETTER[0])},
        r"a seed 1337 and a seed 2024 have the same score to the last digit, 1\.4913",
    ),
    "a copy of the other side": (
        {"bpbs": (*BETTER[:3], BASE[3])},
        "a seed 2024 and base seed 2024 have the same score to the last digit",
    ),
    "no chance": ({"bpbs": [b + 2**-9 for b in BASE]}, "differs by the same"),
    "no score": ({"change": each(status="failed")}, "no run with a score, of 4"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_refused(tmp_path, fault):
    made, says = REFUSED[fault]
    base = trial(tmp_path / "base")
    assert compare(trial(tmp_path / "good", BETTER), base).score == "sliding"
    faulty = trial(tmp_path / "a", **{"bpbs": BETTER} | made)
    for sides in ((faulty, base), (base, faulty)):
        with pytest.raises(CompareError, match=says if sides[0] is faulty else None):
            compare(*sides)


@pytest.mark.parametrize("fault", [*REFUSED, "a seed twice"])
def test_a_refusal_names_no_path_of_a_machine(tmp_path, fault):
    """It goes into README files with the table."""
    trial(tmp_path / "base")
    trial(tmp_path / "good", BETTER)
    trial(tmp_path / "a", **{"bpbs": BETTER} | REFUSED.get(fault, ({},))[0])
    if fault == "a seed twice":
        put(tmp_path / "more" / "a" / "seed42", result(1.4999, 42))
    text = markdown_table(read_runs([tmp_path]))
    assert "- NOT COMPARED: a: " in text
    assert str(tmp_path) not in text


def test_a_damaged_result_is_told_without_its_path(sweep):
    folder = sweep / "better" / "seed42"
    (folder / "result.json").write_text('{"status": "o')
    (folder / "command.sh").touch()
    text = markdown_table(read_runs([sweep]))
    assert "- NOT COUNTED: better seed 42: failed: not a run: " in text
    assert str(sweep) not in text


def test_one_text_within_a_group(tmp_path):
    def other(told: dict) -> None:
        if told["settings"]["seed"] == 7:
            told["val_sha256"] = "07her"

    with pytest.raises(CompareError, match="different validation data"):
        compare(trial(tmp_path / "a", BETTER, change=other), trial(tmp_path / "b"))


def test_a_seed_twice(tmp_path):
    trial(tmp_path / "a", BETTER)
    again = put(tmp_path / "other" / "seed42", result(1.4999, 42))
    base = trial(tmp_path / "b")
    one = read_runs([tmp_path / "a"])
    with pytest.raises(
        CompareError, match="seed 42 is in one group twice, a/seed42 and other/seed42: give"
    ):
        compare([*one, read_run(again)], base)
    with pytest.raises(CompareError, match="seed 1337 is in one group twice"):
        compare([*one, one[0]], base)
    with pytest.raises(CompareError, match="a seed 1337 and a seed 1337 have the same score"):
        compare(one, [*base[1:], one[0]])


def test_a_score_that_some_runs_lack(tmp_path):
    base, lacking = trial(tmp_path / "b"), trial(tmp_path / "a", BETTER, change=no_sliding)
    c = compare(lacking, base)
    assert c.score == "plain"
    assert "compared by plain, though some runs end with sliding" in c.notes
    assert compare(base, trial(tmp_path / "c", BETTER)).notes == []
    assert compare(base, trial(tmp_path / "c", BETTER), "plain").score == "plain"
    with pytest.raises(CompareError, match="the score sliding: a seed 1337 has plain;"):
        compare(lacking, base, "sliding")
    with pytest.raises(CompareError, match="the score float"):
        compare(base, base, "float")
    none = trial(tmp_path / "d", BETTER, change=lambda told: told["scores"].pop("plain"))
    with pytest.raises(CompareError, match="not all runs have one score"):
        compare(lacking, none)


# ---- Which text, which tokens ----


def test_two_tokenizers_compare_in_bits_per_byte_alone(tmp_path, capsys):
    base = trial(tmp_path / "base")
    c = compare(trial(tmp_path / "bytes", BETTER, change=vocabulary(BYTES, "b17e5")), base)
    good = compare(trial(tmp_path / "good", BETTER), base)
    assert (c.bpb_diff, c.p, c.detectable) == (good.bpb_diff, good.p, good.detectable)
    assert c.nats_diff is c.nats_se is c.nats_detectable is c.bar_p is c.bar_met is None
    assert any("only bits per byte" in note for note in c.notes)
    assert c.settings == {"vocab_size": (260, 1024)}
    _, in_nats, _ = shown(capsys, tmp_path / "bytes", "--against", tmp_path / "base")
    assert [*in_nats[0].values()][1:] == ["not comparable", ""]


def test_strides_of_two_tokenizers_are_of_different_units(tmp_path):
    def change(told: dict) -> None:
        vocabulary(BYTES, "b17e5")(told)
        stride(told)

    assert compare(trial(tmp_path / "a", BETTER, change=change), trial(tmp_path / "b")).p < 0.01


def test_a_group_has_one_tokenizer(tmp_path):
    logs = [put_log(tmp_path / f"a_seed{s}.log", b, s) for s, b in enumerate(BETTER[:3])]
    logs.append(put_log(tmp_path / "a_seed9.log", BETTER[3], 9, tokens=BYTES))
    with pytest.raises(CompareError, match="two tokenizers in one group"):
        compare(read_runs(logs), trial(tmp_path / "b"))


def test_without_a_hash_equal_counts_are_one_text(tmp_path):
    base = trial(tmp_path / "base")
    c = compare(trial(tmp_path / "a", BETTER, change=each(val_sha256="")), base)
    assert c.nats_diff < 0
    unknown = trial(tmp_path / "c", BETTER, change=vocabulary(0, "", 0))
    with pytest.raises(CompareError, match=r"0 tokens, 0 bytes, sha256 0; score both"):
        compare(unknown, base)
    with pytest.raises(CompareError, match="0 tokens, 0 bytes"):
        compare(unknown, trial(tmp_path / "d", change=vocabulary(0, "", 0)))


def test_the_end_of_the_challenges_text_may_be_missing(tmp_path):
    """Other scripts score whole windows only."""
    size, tokens = program.VAL_BYTES, 62_021_845
    base = trial(tmp_path / "base", change=vocabulary(tokens, "", size))
    cut = trial(tmp_path / "cut", BETTER, change=vocabulary(tokens - 213, "", size - 519))
    assert compare(cut, base).nats_diff < 0
    shorter = trial(tmp_path / "short", BETTER, change=vocabulary(tokens, "", size - 50_000))
    for sides in ((shorter, base), (base, shorter)):
        with pytest.raises(CompareError, match="different validation data"):
            compare(*sides)


# ---- Logs ----


def test_logs_compare_as_run_folders_do(tmp_path):
    of = program.VAL_TOKENS, program.VAL_BYTES
    theirs = [
        put_log(tmp_path / "theirs" / f"train_seed{s}.log", b, s, 64, *of)
        for s, b in zip(SEEDS, BETTER, strict=True)
    ]
    c = compare(read_runs(theirs), trial(tmp_path / "base", change=challenge))
    good = compare(
        trial(tmp_path / "good", BETTER, change=challenge), read_runs([tmp_path / "base"])
    )
    assert c.method == "paired t"
    for name in ("p", "bpb_diff", "bpb_se", "low", "high", "detectable", "nats_diff", "bar_p"):
        assert getattr(c, name) == pytest.approx(getattr(good, name), rel=1e-4), name
    assert any("log without settings" in note for note in c.notes)
    assert c.settings == {}
    assert not any("log without" in note for note in good.notes)


def test_a_log_at_another_stride_is_refused(tmp_path):
    logs = [put_log(tmp_path / f"a_seed{s}.log", b, s, stride=256) for s, b in enumerate(BETTER)]
    with pytest.raises(CompareError, match="stride 256"):
        compare(read_runs(logs), trial(tmp_path / "b"))


def test_an_unsaid_stride_is_no_other_one(tmp_path):
    logs = [put_log(tmp_path / f"a_seed{s}.log", b, s, stride=0) for s, b in enumerate(BETTER)]
    base = trial(tmp_path / "b")
    assert compare(read_runs(logs), base).p == compare(base, read_runs(logs)).p < 0.01


def test_runs_without_a_seed_are_no_pairs(tmp_path):
    a, b = trial(tmp_path / "a", BETTER), trial(tmp_path / "b")
    assert a[3].seed == b[3].seed
    del a[3].settings["seed"], b[3].settings["seed"]  # three pairs would lose a run of each
    c = compare(a, b)
    assert (c.method, c.n_a, c.n_b) == ("Welch t", 4, 4)
    del a[0].settings["seed"], b[1].settings["seed"]
    assert compare(a, b).p == c.p


# ---- What is said ----


def shown(capsys, *argv: object, status: int = 0) -> list[list[dict[str, str]]]:
    capsys.readouterr()
    assert main([str(x) for x in argv]) == status
    return tables(capsys.readouterr().out)


def numbers(cell: str) -> list[float]:
    return [float(x) for x in re.findall(r"[-+]?\d[\d.e-]*", cell)]


def test_a_sweep_against_its_base(sweep, capsys):
    scores, in_nats, context = shown(capsys, sweep)
    assert [row["trial"] for row in scores] == ["base", "alike", "better"]
    base, alike, better = scores
    assert [row["seeds"] for row in scores] == ["4", "3 of 4", "4"]
    assert numbers(base["bpb, sliding"]) == [1.5014, pytest.approx(np.std(BASE, ddof=1), abs=5e-6)]
    assert [*base.values()][3:] == [""] * 6
    runs = {name: read_runs([sweep / name]) for name in ("base", "alike", "better")}
    ps = []
    for row, name in ((alike, "alike"), (better, "better")):
        c = compare(runs[name], runs["base"])
        ps.append(c.p)
        assert numbers(row["less base"]) == pytest.approx([c.bpb_diff, c.bpb_se], abs=5e-6)
        assert numbers(row["95 % interval"]) == pytest.approx([c.low, c.high], abs=5e-6)
        assert numbers(row["p"]) == [pytest.approx(c.p, rel=0.05)]
        assert numbers(row["visible"]) == [pytest.approx(c.detectable, abs=5e-6)]
        assert row["test"] == "paired t"
        (line,) = (line for line in in_nats if line["trial"] == name)
        assert numbers(line["nats less base"]) == pytest.approx([c.nats_diff, c.nats_se], abs=5e-6)
        assert numbers(line["visible"]) == [pytest.approx(c.nats_detectable, abs=5e-6)]
        assert line["better by 0.005"] == ("met" if name == "better" else "not met")
        assert numbers(line["p"]) == [pytest.approx(c.bar_p, rel=0.05)]
    adjusted = [numbers(row["p (Holm)"])[0] for row in (alike, better)]
    assert adjusted == pytest.approx(holm(ps), rel=0.05)
    assert adjusted[1] > 1.9 * ps[1]
    assert [row["settings"] for row in context] == [f"MATRIX_LR={x}" for x in (0.02, 0.025, 0.03)]
    assert all(
        [*row.values()][2:] == ["1,518,856", "1,496,907", "121.5", "152.7"] for row in context
    )


def test_what_failed_is_said_under_the_table(sweep, capsys):
    main([str(sweep)])
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("- ")]
    assert notes == [
        "- NOT COUNTED: alike seed 7: nan: loss | is nan at \\<step> 3",
        "- the pairs of alike and base are without seed 7",
    ]


def test_one_faulty_trial_leaves_the_others_and_is_told_by_the_status(sweep, capsys):
    trial(sweep / "lone", BETTER[:1], SEEDS[:1])
    scores, in_nats, _ = shown(capsys, sweep, status=1)
    (row,) = (row for row in scores if row["trial"] == "lone")
    assert [*row.values()] == ["lone", "1", "1.49130", *[""] * 6]
    (row,) = (row for row in in_nats if row["trial"] == "lone")
    assert row["nats less base"] == "not comparable"
    assert next(row for row in scores if row["trial"] == "better")["p"]
    main([str(sweep)])
    assert "- NOT COMPARED: lone: one run with a score, seed 1337, of 1" in capsys.readouterr().out


def test_a_trial_not_yet_run_or_killed_is_shown(sweep, capsys):
    for name, seed in (("better", 99), ("base", 99), ("better.cut1", 5)):
        folder = sweep / name / f"seed{seed}{'.cut1' * ('cut' in name)}"
        folder.mkdir(parents=True)
        (folder / "command.sh").write_text("true\n")
    put_log(sweep / "base" / "seed99" / "train.log", 1.3, 99)  # killed between two scores
    scores, *_ = shown(capsys, sweep)
    assert [(row["trial"], row["seeds"]) for row in scores] == [
        ("base", "4 of 5"),
        ("alike", "3 of 4"),
        ("better", "4 of 5"),
    ]
    main([str(sweep)])
    out = capsys.readouterr().out
    assert "NOT COUNTED: base seed 99: cut off" in out
    assert "NOT COUNTED: better seed 99: waiting" in out
    assert read_runs([sweep / "base" / "seed99"])[0].seed == 99
    assert read_runs([sweep / "better" / "seed99"])[0].seed == 99


def test_over_a_limit_and_other_machines_are_said(tmp_path):
    def change(told: dict) -> None:
        told |= {"status": "over a limit", "verdicts": {"a": "PASS", "total_bytes": "FAIL"}}
        told |= {"machine": {"device": "gpu"}, "code_sha256": "07her"}

    base = trial(tmp_path / "b")
    c = compare(trial(tmp_path / "a", BETTER, change=change), base)
    assert c.n_a == 4
    assert [note for note in c.notes if "seed 7 is over a limit: total_bytes" in note]
    assert {
        "two programs, by sha256: a has 07her, b has c0de",
        "not all runs have the same machine",
    } < {*c.notes}
    assert compare(trial(tmp_path / "c", BETTER, change=each(machine={})), base).notes == []


def test_the_base_is_base_or_none_or_the_first_or_as_told(tmp_path, capsys):
    trial(tmp_path / "b", BETTER)
    trial(tmp_path / "c", BASE)
    heads = lambda *argv: list(shown(capsys, tmp_path, *argv)[0][0])  # noqa: E731
    assert heads()[3] == "less b"
    trial(tmp_path / "none", [b + 0.001 for b in BETTER[:3]] + [1.4], matrix_lr=0.1)
    assert heads()[3] == "less none"
    trial(tmp_path / "base", [b + 0.002 for b in BASE[:3]] + [1.5], matrix_lr=0.2)
    assert heads()[3] == "less base"
    assert heads("--base", "c")[3] == "less c"
    assert main([str(tmp_path), "--base", "d"]) == 2
    said = capsys.readouterr().err
    assert "base d of trials b, base, c, none: it takes a --base among them" in said


@pytest.mark.parametrize("seeds", [4, 1])
def test_a_trial_alone_is_a_row(tmp_path, capsys, seeds):
    runs = trial(tmp_path / "first" / "base", BASE[:seeds], SEEDS[:seeds], challenge)
    scores, context = shown(capsys, tmp_path / "first")
    assert scores == [
        {
            "trial": "base",
            "seeds": str(seeds),
            "bpb, sliding": "1.50140 +- 0.00161" if seeds == 4 else "1.50100",
        }
    ]
    assert [*context[0].values()] == ["base", "", "1,518,856", "1,496,907", "121.5", "152.7"]
    assert markdown_table(runs).endswith("over all seeds with a score.\n")
    assert main([str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["comparison"] is None
    put(tmp_path / "first" / "base" / "seed5", result(1.5, 5) | {"code_sha256": "07her"})
    assert main([str(tmp_path)]) == 2
    assert "several programs" in capsys.readouterr().err


def test_training_data_is_a_setting_its_place_is_not(tmp_path, capsys):
    trial(tmp_path / "none", data_path="/here/fineweb10B_sp1024")
    trial(tmp_path / "a", BETTER, data_path="/here/bench_sp1024")
    trial(tmp_path / "b", [b + 1e-4 for b in BETTER[:3]] + [1.5], data_path="./fineweb10B_sp1024/")
    _, _, context = shown(capsys, tmp_path)
    assert [(row["trial"], row["settings"]) for row in context] == [
        ("none", "DATA_PATH=fineweb10B_sp1024"),
        ("a", "DATA_PATH=bench_sp1024"),
        ("b", ""),
    ]


def test_the_legend_says_which_seeds_a_mean_is_over(sweep):
    legend = " ".join(markdown_table(read_runs([sweep])).split())
    assert "mean +- standard deviation over all seeds with a score." in legend
    assert "of a paired t over the seeds that both have" in legend


def test_two_groups(sweep, capsys):
    sides = [[sweep / name / f"seed{s}" for s in SEEDS] for name in ("better", "base")]
    scores, in_nats, context = shown(capsys, sweep / "better", "--against", sweep / "base")
    assert [row["trial"] for row in scores] == ["base", "better"]
    assert "p (Holm)" not in scores[0]
    assert in_nats[0]["better by 0.005"] == "met"
    assert context[1]["settings"] == "MATRIX_LR=0.03"
    by_runs = shown(capsys, *sides[0], "--against", *sides[1])
    assert [*by_runs[0][1].values()][1:] == [*scores[1].values()][1:]
    back = shown(capsys, sweep / "base", "--against", sweep / "better")
    assert numbers(back[0][1]["less better"])[0] > 0
    assert back[1][0]["better by 0.005"] == "not met"


def test_logs_in_one_folder_are_trials_by_name(tmp_path, capsys):
    for name, bpbs in (("mine", BETTER), ("none", BASE)):
        for seed, bpb in zip(SEEDS, bpbs, strict=True):
            put_log(tmp_path / f"{name}_seed{seed}.log", bpb, seed)
    scores, *_ = shown(capsys, tmp_path)
    assert [(row["trial"], row["seeds"]) for row in scores] == [("none", "4"), ("mine", "4")]


def test_the_logs_of_an_entry_are_its_arms(tmp_path, capsys):
    for name, bpbs in (("plain", BETTER), ("none", BASE), ("seed_test", [b + 0.1 for b in BETTER])):
        for seed, bpb in zip(SEEDS, bpbs, strict=True):
            put_log(tmp_path / f"train_{name}_seed{seed}.log", bpb, seed)
    scores, *_ = shown(capsys, tmp_path)
    assert [row["trial"] for row in scores] == ["none", "plain", "seed_test"]


@pytest.mark.parametrize(
    ("path", "trial", "seed"),
    [
        ("logs/seed_test", "seed_test", None),
        ("logs/base/seed7", "base", 7),
        ("logs/base/seed-7", "base", -7),
        ("logs/base_seed7", "base", 7),
        ("logs/train_x", "train_x", None),
        ("logs/v1.2/seed7", "v1.2", 7),
        ("logs/base/seed7/train.log", "base", None),
        ("2026-03-25_Theirs/train_seed42.log", "2026-03-25_Theirs", 42),
        ("x/train_MUON_WD=0.1+seed_test_seed42.log", "MUON_WD=0.1+seed_test", 42),
        ("x/train_plain.log", "plain", None),
        ("x/training_seed_3.txt", "training", 3),
        ("x/trainseed3.log", "trainseed3", None),
        ("/seed3", "", 3),
    ],
)
def test_trial_and_seed_by_name(path, trial, seed):
    assert (trial_of(Path(path)), split_name(Path(path))[1]) == (trial, seed)


def test_a_log_that_does_not_say_its_seed_has_that_of_its_name(tmp_path):
    logs = [put_log(tmp_path / f"train_seed{s}.log", 1.5, s) for s in (3, 4)]
    logs[0].write_text(logs[0].read_text().replace("seed:3", ""))
    logs[1] = logs[1].rename(tmp_path / "train_seed9.log")
    assert [read_run(log).seed for log in logs] == [3, 4]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["base", "--base", "none"], "base none of trials base: .* a second group after --against"),
        (["nowhere"], "nowhere: no result.json"),
        (["better", "--against", "base", "--score", "ttt"], "not all runs have the score ttt"),
        (
            ["lone", "--against", "base"],
            "lone cannot be compared .*: one run with a score, seed 1337",
        ),
        (["better", "base", "--against", "alike"], "seed 1337 is in one group twice"),
    ],
)
def test_what_cannot_be_compared_is_an_error(sweep, capsys, monkeypatch, argv, says):
    trial(sweep / "lone", (1.49, 1.48), SEEDS[:2])
    put(sweep / "lone" / "seed42", {"status": "oom", "reason": "lower MICRO_BATCH_TOKENS"})
    monkeypatch.chdir(sweep)
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert re.search(says, captured.err)
    if "lone" in argv:  # what failed is not hidden by the refusal
        assert "NOT COUNTED: lone seed 42: oom: lower MICRO_BATCH_TOKENS" in captured.err


def test_the_table_for_other_tools(sweep, tmp_path):
    text = markdown_table(read_runs([sweep]))
    (rows,) = tables(text)
    assert [row["trial"] for row in rows] == ["base", "alike", "better"]
    assert text == markdown_table(read_runs([sweep]), base="base", score="sliding")
    assert "NOT COUNTED" in text
    assert "smallest true difference" in text
    (rows,) = tables(markdown_table(read_runs([sweep]), base="better", score="plain"))
    assert list(rows[0])[2:4] == ["bpb, plain", "less better"]
    assert numbers(rows[0]["bpb, plain"])[0] == pytest.approx(1.50165, abs=1e-5)


def test_a_bar_in_a_name_leaves_the_table_whole(tmp_path):
    trial(tmp_path / "a|b", BETTER)
    (rows,) = tables(markdown_table([*trial(tmp_path / "base"), *read_runs([tmp_path / "a|b"])]))
    assert rows[1]["trial"] == r"a\|b"


def test_json(sweep, capsys):
    assert main([str(sweep), "--json"]) == 0
    told = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert [row["name"] for row in told] == ["base", "alike", "better"]
    assert told[0]["comparison"] is None
    assert told[0]["runs"][0] == str(sweep / "base" / "seed1337")
    c = compare(read_runs([sweep / "better"]), read_runs([sweep / "base"]))
    better = told[2]["comparison"]
    assert better["p"] == c.p
    assert better["p_holm"] == 2 * c.p
    assert better["bar_met"] is True
    assert better["settings"] == {"matrix_lr": [0.03, 0.02]}


def test_a_terminal_gets_drawn_tables(sweep, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main([str(sweep)]) == 0
    out = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    assert "| ---" not in out
    assert re.search(r"better +4 +1\.49165 \+- 0\.\d+ +-0\.\d+ \+- 0\.\d+", out)
    assert "loss | is nan at <step> 3" in out


def test_the_program_runs_anywhere(sweep):
    done = subprocess.run(
        [sys.executable, ROOT / "records" / "compare.py", "better", "--against", "base"],
        cwd=sweep,
        capture_output=True,
        text=True,
        check=True,
    )
    assert [row["trial"] for row in tables(done.stdout)[0]] == ["base", "better"]


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert "\n    python records/compare.py logs/mine --against records/" in out


def test_a_group_is_not_compared_with_itself(sweep, capsys):
    with pytest.raises(SystemExit) as ended:
        main([str(sweep / "base"), "--against", str(sweep / "base")])
    assert ended.value.code == 2
    assert "is on both sides; give a second group after --against" in capsys.readouterr().err


def test_a_base_and_another_group_are_one_too_many(sweep, capsys):
    with pytest.raises(SystemExit) as ended:
        main([str(sweep / "better"), "--against", str(sweep / "base"), "--base", "none"])
    assert ended.value.code == 2
    assert "--base names a trial, --against" in capsys.readouterr().err
