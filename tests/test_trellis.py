"""Trellis-coded quantization, codes by sensitivity, tuned scales."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from bench.harness import quantize_model
from conftest import TINY, settings
from hostile import CODECS
from launch import advance_clock, before_call
from test_gptq import collect, problem
from test_model import random_model, some_ids

import train_gpt as tg

TRELLISES = ["trellis4", "trellis"]
every_trellis = pytest.mark.parametrize("name", TRELLISES)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- The trellis ----


def walk(quantizer: tg.Quantizer, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What chains of codes [..., steps] stand for, and whether their states are odd."""
    state, values, odd = (
        np.zeros(codes.shape[:-1], int),
        np.zeros(codes.shape),
        np.zeros_like(codes),
    )
    for step in range(codes.shape[-1]):
        code = codes[..., step]
        odd[..., step] = state % 2
        values[..., step] = code - state % 2 * 0.5 * np.sign(code)
        state = quantizer.next_state[state, code % 2]
    return values, odd


def nearest(x: float, odd: int, parity: int, limit: int) -> int:
    """The code of a parity, from -limit to limit, that stands for what is nearest to x."""
    codes = [code for code in range(-limit, limit + 1) if code % 2 == parity]
    return min(codes, key=lambda code: abs(code - odd * 0.5 * np.sign(code) - x))


@every_trellis
@pytest.mark.parametrize("seed", range(3))
def test_the_path_is_the_best_of_all_chains_of_codes(name, seed):
    """Tried by brute force: every chain of 5 codes from -3 to 3, without the cost of codes; with
    it, every chain of nearest codes."""
    quantizer, limit = tg.QUANTIZERS[name], 3
    x = 1.5 * normal(2, 3, 5, seed=seed)
    costs = 3 * quantizer.code_costs(x, limit)
    free = quantizer.encode(x, limit, torch.zeros_like(costs))[1].double()
    codes, values = quantizer.encode(x, limit, costs)
    chains = np.array([*itertools.product(range(-limit, limit + 1), repeat=5)])
    stands = walk(quantizer, chains)[0]
    for matrix, col in itertools.product(range(2), range(3)):
        target, nats = x[matrix, col].double().numpy(), costs[matrix].numpy()
        least = ((stands - target) ** 2).sum(1).min()
        assert ((free[matrix, col].numpy() - target) ** 2).sum() == pytest.approx(least, rel=1e-5)

        def cost(chain: np.ndarray, target=target, nats=nats) -> float:
            values, odd = walk(quantizer, chain)
            return float(((values - target) ** 2).sum() + nats[odd, abs(chain)].sum())

        tried = []
        for parities in itertools.product((0, 1), repeat=5):
            chain = np.zeros(5, int)
            for step, parity in enumerate(parities):
                odd = walk(quantizer, chain)[1][step]
                chain[step] = nearest(target[step], odd, parity, limit)
            tried.append(cost(chain))
        found = codes[matrix, col].int().numpy()
        assert cost(found) == pytest.approx(min(tried), rel=1e-5)
        np.testing.assert_array_equal(walk(quantizer, found)[0], values[matrix, col].numpy())


@pytest.mark.parametrize("name", tg.QUANTIZERS)
@pytest.mark.parametrize("rows", [1, 2, 63, 64, 65, 128, 200])
def test_codes_decode_to_what_the_encoder_meant(name, rows):
    """Of a scalar quantizer that is the codes. Rows that share a step are chains of their own."""
    quantizer = tg.QUANTIZERS[name]
    x = 4 * normal(2, 3, rows)
    codes, values = quantizer.encode(x, 31, quantizer.code_costs(x, 31))
    for own, meant in zip(codes, values, strict=True):
        stored = own.mT.to(torch.int8)
        assert torch.equal(quantizer.decode(stored), meant.mT)
        assert quantizer.decode(stored.to("meta")).device.type == "meta"  # as on a GPU
        side = -(-rows // 64)
        for first in range(side):
            chain = stored[first::side].numpy().astype(int)
            stands = walk(quantizer, chain.T)[0].T if name != "scalar" else chain
            np.testing.assert_array_equal(stands, meant.mT[first::side].numpy())


@every_trellis
def test_a_trellis_is_finer_at_an_equal_entropy(name):
    """Normal weights: at least 0.7 dB less error, of 1.53 dB that any quantizer can gain."""
    x = normal(1, 1024, 64)

    def measure(quantizer: tg.Quantizer, scale: float) -> tuple[float, float]:
        """Bits a code, where even and odd states have codes of their own; and the error."""
        codes, values = quantizer.encode(x / scale, 127, quantizer.code_costs(x / scale, 127))
        odd = walk(quantizer, codes[0].numpy().astype(int))[1]
        groups = [codes[0][torch.from_numpy(odd == state)] for state in (0, 1)]
        bits = 8 * sum(tg.code_entropy(group) for group in groups if len(group)) / x.numel()
        return bits, ((values * scale - x) ** 2).mean().item()

    bits, error = measure(tg.QUANTIZERS[name], 0.4)
    scalar = [measure(tg.QUANTIZERS["scalar"], scale) for scale in np.geomspace(0.3, 0.5, 60)]
    equal = min(scalar, key=lambda found: abs(found[0] - bits))
    assert abs(equal[0] - bits) < 0.02
    assert 10 * math.log10(equal[1] / error) > 0.7


# ---- GPTQ with it ----


@every_trellis
@pytest.mark.parametrize(("n", "rows", "cols"), [(2, 12, 37), (1, 70, 2 * tg.GPTQ_BLOCK + 9)])
def test_each_column_is_the_path_for_what_the_columns_before_left(name, n, rows, cols):
    """Gaussian elimination in float64, column by column, leaves what the trellis must encode.

    One input is always 0. A path may differ where float32 cannot tell it from another.
    """
    quantizer, limit = tg.QUANTIZERS[name], 31
    weight, hessian = problem(n, rows, cols)
    hessian[0, 3] = hessian[0, :, 3] = 0
    scales = tg.std_scales(4.0, limit, weight, hessian)
    found = tg.quantize_gptq(quantizer, limit, weight, scales, hessian).codes
    for own, codes, scale, square in zip(
        weight, found, scales.double(), hessian.double(), strict=True
    ):
        rest = own.double() * (square.diagonal() > 0)
        order = square.diagonal().argsort(descending=True, stable=True)
        damping = 0.01 * square.diagonal().mean() + 1e-6
        inverse = torch.linalg.inv(square + damping * torch.eye(cols))
        costs = quantizer.code_costs((rest.float() / scale.float()[:, None]).mT[None], limit)
        values, same = quantizer.decode(codes).double() * scale[:, None], 0
        for i in order.tolist():
            x = (rest[:, i] / scale).float()
            path = quantizer.encode(x[None, None], limit, costs)[0][0, 0]
            same += torch.equal(path.to(torch.int8), codes[:, i])
            delta = (rest[:, i] - values[:, i]) / inverse[i, i]
            rest -= torch.outer(delta, inverse[i])
            inverse -= torch.outer(inverse[i], inverse[i]) / inverse[i, i]
            inverse[i, i] = 1.0  # of a column that is done
        assert same >= 0.97 * cols
        assert (codes[:, 3] == 0).all() == (square.diagonal()[3] == 0)


@every_trellis
def test_gptq_loses_less_with_a_trellis(name):
    """tr(E H E^T) at equal scales falls although the codes need no more bits."""
    weight, hessian = problem(2, 128, 96)
    scales = tg.std_scales(12.0, 31, weight, hessian)
    lost = {}
    for kind in ("scalar", name):
        quantizer = tg.QUANTIZERS[kind]
        codes = tg.quantize_gptq(quantizer, 31, weight, scales, hessian).codes
        values = torch.stack([quantizer.decode(own) for own in codes])
        error = values * scales.float().unsqueeze(-1) - weight
        lost[kind] = ((error @ hessian) * error).sum().item()
    assert lost[name] < 0.8 * lost["scalar"]


# ---- In the artifact ----


@pytest.mark.parametrize("codec", CODECS)
@every_trellis
def test_an_artifact_of_a_trellis_is_read_as_it_was_meant(name, codec, tmp_path):
    """By every codec; matrices without a Hessian, and tables, have trellises too."""
    changes = {"quantizer": name, "compressor": codec, "scale_rule": "std"}
    model = random_model(**changes, matrix_clip_sigmas=6.0)
    hessians = collect(model, [some_ids(8, 64)])
    del hessians["blocks.0.attn.c_q.weight"]
    arrays = quantize_model(model, hessians)
    path = tmp_path / "a.ptz"
    path.write_bytes(tg.pack_artifact(model.h, arrays))
    read, weights = tg.load_artifact(path, settings())
    assert read.quantizer == name
    for key, codes in arrays.items():
        if key.endswith(".codes"):
            weight, scales = key.removesuffix(".codes"), arrays[key.replace(".codes", ".scales")]
            side = -(-len(codes) // 64)
            meant = np.zeros(codes.shape)
            for first in range(side):
                chain = codes[first::side].numpy().astype(int)
                meant[first::side] = walk(tg.QUANTIZERS[name], chain.T)[0].T
            meant *= scales.double().numpy()[:, None]
            np.testing.assert_allclose(weights[weight].numpy(), meant, rtol=1e-6)


@pytest.mark.skipif("range" not in [p.values[0] for p in CODECS], reason="needs constriction")
@every_trellis
def test_the_range_coder_uses_the_states(name):
    """Codes of odd states are distributed otherwise, so that knowing the state saves bytes."""
    quantizer, x = tg.QUANTIZERS[name], normal(1, 256, 512) / 1.5
    codes = quantizer.encode(x, 31, quantizer.code_costs(x, 31))[0][0].mT.to(torch.int8)
    sizes = {
        kind: len(tg.CODECS["range"].compress([codes.numpy()], tg.QUANTIZERS[kind]))
        for kind in ("scalar", name)
    }
    assert sizes[name] < 0.98 * sizes["scalar"]


# ---- Codes by sensitivity, and tuned scales ----


def lost(model: tg.GPT, weights: dict[str, torch.Tensor], ids: torch.Tensor) -> float:
    """Kullback-Leibler divergence of other weights from the model's, nats a token, in float64."""
    own, other = tg.GPT(model.h), tg.GPT(model.h)
    own.load_state_dict(model.state_dict())
    other.load_state_dict(weights)
    with torch.no_grad():
        p, q = (m.forward_logits(ids).double().log_softmax(-1) for m in (own, other))
    return (p.exp() * (p - q)).sum(-1).mean().item()


def test_scales_are_balanced_so_that_a_bit_costs_the_same_anywhere():
    """Each matrix rounded alone: the divergence is proportional to its number of weights.

    The geometric mean of the scales of matrices stays, so that they need as many bits as before.
    """
    changes = {"scale_rule": "std", "matrix_bits": 8, "matrix_clip_sigmas": 12.0}
    model, ids = random_model(**changes, sensitivity_tokens=512), some_ids(8, 64)
    stacks = tg.weight_stacks(model, {}, tg.Ranks())
    balanced = tg.balance_scales(model, stacks, ids, tg.Ranks())
    exact, found, logs, matrices = model.state_dict(), {}, [], 0
    for before, after in zip(stacks, balanced, strict=True):
        for kind, stack in (("before", before), ("after", after)):
            codes = stack.quantize(stack.weight, stack.scales, stack.hessian)
            for name, own, scales in zip(stack.names, codes, stack.scales, strict=True):
                weights = exact | {name: own.float() * scales.float()[:, None]}
                found[kind, name] = lost(model, weights, ids) / own.numel()
        ratio = after.scales.double() / before.scales.double()
        if before.role == tg.ROLES["matrix"]:
            logs += (ratio.log().mean(1) * before.weight[0].numel()).tolist()
            matrices += before.weight.numel()
    spread = {
        kind: np.std([math.log(value) for (k, _), value in found.items() if k == kind])
        for kind in ("before", "after")
    }
    assert spread["after"] < 0.35 * spread["before"]
    assert sum(logs) / matrices == pytest.approx(0, abs=0.03)  # some rows would be clipped
    assert all(torch.equal(exact[name], p) for name, p in model.named_parameters())


def test_tuning_brings_the_quantized_model_nearer_and_leaves_the_codes():
    """On text that it does not train on; arrays change as they are told to, in float16."""
    changes = {"scale_rule": "std", "matrix_bits": 8, "matrix_clip_sigmas": 90.0}
    model, quantizer = random_model(**changes, quantizer="trellis"), tg.QUANTIZERS["trellis"]
    arrays = quantize_model(model, collect(model, [some_ids(8, 64)]))
    batches = list(some_ids(160, 64).split(8))
    exact = {name: p.clone() for name, p in model.state_dict().items()}
    tuned = tg.tune_scales(model, arrays, quantizer, batches, len(batches), tg.Ranks())
    assert {*tuned} == {name for name in arrays if not name.endswith(".codes")}
    changed = tg.change_arrays(arrays, tuned)
    assert [(n, x.dtype, x.shape) for n, x in changed.items()] == [
        (n, x.dtype, x.shape) for n, x in arrays.items()
    ]
    assert all(torch.equal(changed[n], x) for n, x in arrays.items() if n.endswith(".codes"))
    ids = torch.randint(4, 260, (8, 64), generator=torch.Generator().manual_seed(9))
    before, after = (lost(model, tg.dequantize(x, quantizer), ids) for x in (arrays, changed))
    assert after < 0.9 * before
    assert all(torch.equal(exact[name], p) for name, p in model.state_dict().items())
    none = tg.tune_scales(model, arrays, quantizer, [], 5, tg.Ranks())  # no time was left
    unchanged = tg.change_arrays(arrays, none)
    assert all(torch.equal(unchanged[name], x) for name, x in arrays.items())


@pytest.fixture
def env(byte_corpus, tmp_path) -> dict[str, str]:
    """Settings of a short run that quantizes by all of these."""
    changes = {"QUANTIZER": "trellis", "SENSITIVITY_TOKENS": "256", "TUNE_SCALES": "4"}
    changes |= {"GPTQ_ENABLED": "1", "GPTQ_CALIB_TOKENS": "1024", "MAX_WALLCLOCK_SECONDS": "100"}
    changes |= {"DATA_PATH": str(byte_corpus), "RUN_DIR": str(tmp_path / "run"), "EVAL_STRIDE": "0"}
    return TINY | changes


@pytest.mark.parametrize(("calib", "gptq"), [("random", "1"), ("train", "1"), ("train", "0")])
def test_training_time_covers_all_until_training_text_is_read_last(calib, gptq, env, tmp_path):
    """The saved weights lead to the same artifact again, with the text after the last step."""
    env |= {"GPTQ_CALIB": calib, "GPTQ_ENABLED": gptq}
    assert tg.main([], env) == 0
    result = json.loads((tmp_path / "run/result.json").read_text())
    events = (tmp_path / "run/events.jsonl").read_text().splitlines()
    trained = next(e["seconds"] for e in map(json.loads, events) if "val_loss" in e)
    seconds = result["seconds"]
    assert seconds["calibrate"] < seconds["train"] - trained
    assert seconds["train"] - trained < seconds["calibrate"] + seconds["pack"]
    again = env | {"RUN_DIR": str(tmp_path / "again")}
    assert tg.main(["--quantize", str(tmp_path / "run")], again) == 0
    ours, other = (tmp_path / name / "final_model.int6.ptz" for name in ("run", "again"))
    assert ours.read_bytes() == other.read_bytes()
    result = json.loads((tmp_path / "again/result.json").read_text())
    assert result["scores"]["plain"]["val_bpb"] < result["scores"]["float"]["val_bpb"] + 0.2


@pytest.mark.parametrize(
    ("seconds", "solving", "steps"), [(1.0, 0.0, 4), (2.5, 0.0, 2), (5.0, 0.0, 1), (1.0, 30.0, 0)]
)
def test_tuning_ends_in_time_and_is_kept_from_half_of_its_steps_on(
    seconds, solving, steps, env, tmp_path, monkeypatch, capsys
):
    """A step of 1 s at the start: 6 s are kept for four. Then steps, or GPTQ, are slower.

    What is too late to read text does not count as training.
    """
    now, calls = advance_clock(lambda _: 1.0, monkeypatch.setattr), []

    def divergence(*_: object) -> None:
        now[0] += seconds if "train" in calls else 1.0

    def solve(*_: object) -> None:
        now[0] += solving * ("train" in calls)

    before_call("divergence", divergence, monkeypatch.setattr)
    before_call("quantize_gptq", solve, monkeypatch.setattr)
    before_call("Trainer.train", lambda *_: calls.append("train"), monkeypatch.setattr)
    env |= {"SENSITIVITY_TOKENS": "0", "MAX_WALLCLOCK_SECONDS": "20", "ITERATIONS": "1000"}
    env |= {"SCALE_RULE": "std"}
    assert tg.main([], env) == 0
    said = capsys.readouterr().out
    assert (f"gptq: the time allowed {steps} of 4 tuning batches" in said) is (steps < 4)
    verdicts = json.loads((tmp_path / "run/result.json").read_text())["verdicts"]
    assert verdicts["train_seconds"] == "PASS"
    plain = env | {"TUNE_SCALES": "0", "RUN_DIR": str(tmp_path / "plain")}
    assert tg.main(["--quantize", str(tmp_path / "run")], plain) == 0
    ours, other = (tmp_path / name / "final_model.int6.ptz" for name in ("run", "plain"))
    assert (ours.read_bytes() == other.read_bytes()) is (steps < 2)


def test_gptq_takes_no_training_time_where_no_text_is_read_after_it(env, monkeypatch, capsys):
    """The seconds that are kept cover calibration and balancing."""
    now = advance_clock(lambda _: 1.0, monkeypatch.setattr)
    before_call("balance_scales", lambda *_: now.__setitem__(0, now[0] + 1), monkeypatch.setattr)
    before_call("quantize_gptq", lambda *_: now.__setitem__(0, now[0] + 50), monkeypatch.setattr)
    env |= {"TUNE_SCALES": "0", "SCALE_RULE": "std", "GPTQ_CALIB": "train"}
    assert tg.main(["--check"], env) == 0
    assert "gptq: 1.5 s are kept to quantize on training text" in capsys.readouterr().out


def test_an_artifact_fits_with_tuned_scales(env, tmp_path, monkeypatch, capsys):
    """Tuning happens once; what it found holds for the scales of the last packing too."""
    assert tg.main([], env) == 0
    free = (tmp_path / "run/final_model.int6.ptz").stat().st_size
    code = len(tg.packed_source(tg.read_program()[0]))
    monkeypatch.setattr(tg, "BYTES_LIMIT", code + int(0.8 * free))
    tunings = []
    before_call("tune_scales", lambda *_: tunings.append(1), monkeypatch.setattr)
    again = env | {"RUN_DIR": str(tmp_path / "again"), "MAX_WALLCLOCK_SECONDS": "0"}
    assert tg.main(["--quantize", str(tmp_path / "run")], again) == 0
    assert (tmp_path / "again/final_model.int6.ptz").stat().st_size <= int(0.8 * free)
    assert capsys.readouterr().out.count("bytes packed") > 2
    assert len(tunings) == 1
