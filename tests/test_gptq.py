"""GPTQ against the paper's elimination in float64, Hessians, and the text of calibration."""

import json

import numpy as np
import pytest
import torch
from bench.harness import quantize_model
from conftest import TINY, load, quantize_matrices, settings
from test_model import random_model, some_ids

import train_gpt as tg

# ---- The reference ----


def correlated(rows: int, cols: int, seed: int) -> torch.Tensor:
    """Inputs [rows, cols] that depend on each other and differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(cols, cols, generator=generator) / cols**0.5
    x = torch.randn(rows, cols, generator=generator) @ (mix + 0.3 * torch.eye(cols))
    return x * (0.1 + torch.rand(cols, generator=generator))


def problem(n: int, rows: int, cols: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A stack of weights [n, rows, cols] and one of X^T X."""
    weight = torch.randn(n, rows, cols, generator=torch.Generator().manual_seed(0)) * 0.05
    inputs = torch.stack([correlated(3 * cols, cols, 10 * i) for i in range(n)])
    return weight, inputs.mT @ inputs


def eliminate(
    weight: np.ndarray, inverse: np.ndarray, order: np.ndarray, scale: np.ndarray, limit: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes of a matrix, the errors of its rows, and how near a row came to a code's border.

    Optimal brain quantization in a fixed order: round a weight, let the free ones compensate, and
    take it out of the inverse Hessian by Gaussian elimination.
    """
    rest, inverse, codes = weight.copy(), inverse.copy(), np.zeros_like(weight)
    error, margin = np.zeros(len(weight)), np.full(len(weight), 0.5)
    for i in order:
        value = rest[:, i] / scale
        codes[:, i] = value.round().clip(-limit, limit)
        to_border = np.where(abs(value) < limit + 0.5, abs(abs(value) % 1 - 0.5), 0.5)
        margin = np.minimum(margin, to_border)
        delta = (rest[:, i] - codes[:, i] * scale) / inverse[i, i]
        error += delta**2 * inverse[i, i]
        rest -= np.outer(delta, inverse[i])
        inverse -= np.outer(inverse[i], inverse[i]) / inverse[i, i]
        inverse[i, i] = 1.0  # of a weight that is done: not read again
    return codes, error, margin


def weighted(codes, scales, weight: torch.Tensor, hessian: torch.Tensor) -> float:
    """tr(E H E^T) in float64, where E is the error of the weights."""
    codes, scales = torch.as_tensor(codes).double(), torch.as_tensor(scales).double()
    e = codes * scales[:, None] - weight.double()
    return ((e @ hessian.double()) * e).sum().item()


def check(
    codes: torch.Tensor,
    scales: torch.Tensor,
    weight: torch.Tensor,
    hessian: torch.Tensor,
    bits: int = 6,
    factor: float = 1.0,
    damping: float = 0.01,
) -> None:
    """Asserts the reference's codes, wherever float32 cannot decide otherwise, and its error.

    It cannot where no value is within 0.0002 of a code's border, and no other clip is nearly as
    good.
    """
    limit, h, w = 2 ** (bits - 1) - 1, hessian.double().numpy(), weight.double().numpy()
    diagonal = h.diagonal()
    order = np.argsort(-diagonal, kind="stable")
    damped = h + damping * diagonal.mean() * np.eye(len(h))
    inverse = np.linalg.inv(damped)
    w = np.where(diagonal == 0, 0.0, w)
    peak = abs(w).max(1)
    scale_of = [np.float16(peak * clip / limit).astype(float) for clip in tg.CLIP_RATIOS]
    error_of = np.stack([eliminate(w, inverse, order, s, limit)[1] for s in scale_of])
    best, second = np.sort(error_of, axis=0)[:2]
    want_scales = np.stack(scale_of)[error_of.argmin(0), np.arange(len(w))]
    want_scales = np.float16(want_scales * factor).astype(float)  # it multiplies the best scale
    want_codes, _, margin = eliminate(w, inverse, order, want_scales, limit)
    sure = torch.from_numpy((margin > 0.0002) & (second > 1.001 * best))
    assert sure.double().mean() >= 0.6  # else there would be nothing to compare
    assert torch.equal(scales[sure].double(), torch.from_numpy(want_scales)[sure])
    assert torch.equal(codes[sure].double(), torch.from_numpy(want_codes)[sure])
    want = weighted(want_codes, want_scales, weight, torch.from_numpy(damped))
    got = weighted(codes, scales, weight, torch.from_numpy(damped))
    assert got == pytest.approx(want, rel=0.02)


# ---- GPTQ itself ----


@pytest.mark.parametrize(
    ("n", "rows", "cols", "bits", "factor"),
    [
        (3, 10, 24, 6, 1.0),
        (2, 12, 37, 6, 1.25),
        (2, 12, 16, 8, 1.0),
        (1, 16, 2 * tg.GPTQ_BLOCK + 9, 6, 1.0),  # several blocks, and a part of one
    ],
)
def test_gptq_equals_the_elimination_code_for_code(n, rows, cols, bits, factor):
    weight, hessian = problem(n, rows, cols)
    codes, scales = quantize_matrices("gptq", weight, hessian, bits, factor)
    rounded, rounded_scales = quantize_matrices("rounding", weight, None, bits, factor)
    assert codes.dtype == torch.int8
    for i in range(n):
        check(codes[i], scales[i], weight[i], hessian[i], bits, factor)
        error = weighted(codes[i], scales[i], weight[i], hessian[i])
        assert error < 0.9 * weighted(rounded[i], rounded_scales[i], weight[i], hessian[i])


@pytest.mark.parametrize(("bits", "factor"), [(6, 1.25), (8, 1.0)])
def test_with_an_identity_as_hessian_gptq_is_rounding(bits, factor):
    weight, _ = problem(2, 16, 48)
    got = quantize_matrices("gptq", weight, 7.0 * torch.eye(48).expand(2, -1, -1), bits, factor)
    want = quantize_matrices("rounding", weight, None, bits, factor)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.fault(41)
def test_inputs_that_are_always_zero_get_codes_of_zero():
    weight, hessian = problem(2, 12, 24)
    hessian[0, [3, 20]] = 0
    hessian[0, :, [3, 20]] = 0
    codes, scales = quantize_matrices("gptq", weight, hessian)
    assert not codes[0][:, [3, 20]].any()
    assert codes[1][:, [3, 20]].any()
    # The zeros change nothing else but the damping, by the mean of the diagonal.
    live = hessian[0].diagonal() > 0
    check(codes[0], scales[0], weight[0] * live, hessian[0])


@pytest.mark.fault(42)
@pytest.mark.parametrize("inputs", [0, 1, 3, 8, 1000])
@pytest.mark.parametrize("tail", [0.0, 4.0])
def test_hessians_of_few_inputs_and_of_unequal_ones_are_solved(inputs, tail):
    """Damping alone makes X^T X positive definite, whatever its rank and its diagonal."""
    weight, _ = problem(1, 12, 256)
    draw = torch.Generator().manual_seed(inputs)
    x = torch.randn(inputs, 256, generator=draw)
    x *= (tail * torch.randn(256, generator=draw)).exp()
    hessian = (x.T @ x)[None]
    codes, scales = quantize_matrices("gptq", weight, hessian)
    damped = hessian[0].double() + 0.01 * hessian[0].double().diagonal().mean() * torch.eye(256)
    rounded, rounded_scales = quantize_matrices("rounding", weight)
    error = weighted(codes[0], scales[0], weight[0], damped)
    assert error <= weighted(rounded[0], rounded_scales[0], weight[0], damped)


@pytest.mark.fault(42)
def test_a_matrix_whose_inputs_overflow_is_rounded_and_named(byte_corpus, tmp_path, capsys):
    """Here the inputs of one matrix are about 1e24, so that their squares are not finite."""
    h, name = settings(num_layers=1), "blocks.0.mlp.down.weight"
    model = random_model(num_layers=1)
    with torch.no_grad():
        model.blocks[0].mlp.up.weight.mul_(1e12)
        model.blocks[0].mlp.down.weight.zero_()
    tg.write_tensors(tmp_path / "weights", model.state_dict(), tg.model_settings(h))
    env = TINY | {"DATA_PATH": str(byte_corpus), "RUN_DIR": str(tmp_path / "run")}
    env |= {"GPTQ_ENABLED": "1", "GPTQ_CALIB_TOKENS": "256", "EVAL_STRIDE": "0"}
    assert tg.main(["--quantize", str(tmp_path / "weights")], env) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "is rounded" in line]
    assert lines == [f"gptq: {name} is rounded: no finite inputs calibrate it"]


# ---- Hessians ----


def collect(model: tg.GPT, batches) -> dict[str, torch.Tensor]:
    """The Hessians of all batches."""
    return tg.collect_hessians(model, batches, tg.Ranks())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hessians_are_sums_over_all_inputs_of_the_matrices(dtype):
    """In float32 even where the activations are bf16; a repeated layer has more inputs."""
    model = random_model(dtype, jepa_chunk_size=4, num_loops=2)
    want, hooks, ids = {}, [], some_ids(8, 64)
    for name, module in model.blocks.named_modules(prefix="blocks"):
        if isinstance(module, torch.nn.Linear):
            # The attention's input is multiplied by three matrices in one product.
            parent, _, layer = name.rpartition(".")
            reader = model.get_submodule(parent) if layer in ("c_q", "c_k", "c_v") else module

            def keep(_, inputs, name=name):
                x = inputs[0].detach().double().flatten(0, -2)
                want[f"{name}.weight"] = want.get(f"{name}.weight", 0) + x.T @ x

            hooks.append(reader.register_forward_pre_hook(keep))
    model.backbone(ids)
    for hook in hooks:
        hook.remove()
    whole, parts = collect(model, [ids]), collect(model, [ids[:1], ids[1:6], ids[6:]])
    roles = tg.parameter_roles(model)
    assert whole.keys() == want.keys() == {n for n, role in roles.items() if role == "matrix"}
    model.backbone(ids)  # is not counted any more
    for name, sums in want.items():
        size = sums.abs().max().item()
        assert whole[name].dtype == torch.float32
        torch.testing.assert_close(whole[name].double(), sums, atol=1e-5 * size, rtol=1e-4)
        # Parts of another size are multiplied in another order, which bf16 shows.
        near = 1e-5 if dtype == torch.float32 else 0.02
        torch.testing.assert_close(parts[name], whole[name], atol=near * size, rtol=1e-4)


# ---- The artifact ----


def test_hessians_change_the_codes_of_their_matrices_and_no_layout():
    model = random_model()
    hessians = collect(model, [some_ids(8, 64)])
    del hessians["blocks.0.attn.c_q.weight"]
    plain, solved = quantize_model(model, {}), quantize_model(model, hessians)
    layouts = [[(n, a.shape, a.dtype) for n, a in arrays.items()] for arrays in (plain, solved)]
    assert layouts[0] == layouts[1]
    changed = {n for n in plain if n.endswith(".codes") and not torch.equal(plain[n], solved[n])}
    assert changed == {f"{name}.codes" for name in hessians}
    for name in ("blocks.2.attn.c_q.weight", "blocks.1.mlp.up.weight"):
        weight = model.state_dict()[name]
        codes, scales = quantize_matrices("gptq", weight[None], hessians[name][None])
        same = (codes[0] == solved[f"{name}.codes"]).float().mean()
        assert same > 0.995  # all but those that the order of a sum may decide
        torch.testing.assert_close(scales[0], solved[f"{name}.scales"])


def test_random_sequences_have_no_special_ids_and_repeat_by_seed():
    ids = tg.random_sequences(5, 64, 260, seed=1)
    assert (ids.shape, ids.dtype) == ((5, 64), torch.int64)
    assert ids.min() >= 4
    assert len(ids.unique()) > 150
    assert torch.equal(ids, tg.random_sequences(5, 64, 260, seed=1))
    assert not torch.equal(ids, tg.random_sequences(5, 64, 260, seed=2))


@pytest.mark.parametrize("calib", ["random", "train"])
def test_a_run_calibrates_on_the_text_that_it_states_and_never_on_validation_text(
    calib, byte_corpus, tmp_path
):
    """The artifact follows from the saved weights and the calibration text alone.

    Training text is that of the step after the last, and reading it is training time.
    """
    changes = {"num_layers": 2, "iterations": 4, "gptq_enabled": 1, "gptq_calib": calib}
    changes |= {"gptq_calib_tokens": 1100, "max_wallclock_seconds": 100, "eval_stride": 0}
    env = TINY | {name.upper(): str(value) for name, value in changes.items()}
    folder = tmp_path / "run"
    assert tg.main([], env | {"DATA_PATH": str(byte_corpus), "RUN_DIR": str(folder)}) == 0
    h = settings(data_path=byte_corpus, **changes)
    model = tg.GPT(h).eval()
    model.load_state_dict(tg.load_checkpoint(folder / "final_model.safetensors", h).weights)
    ids = tg.random_sequences(17, 64, 260, h.seed)
    if calib == "train":
        ids = load(h).train.sequences(4 * h.train_batch_tokens // 64, 17)[:, :-1]
        assert torch.equal(ids[:16], load(h).train.batch(4)[0])
    arrays = quantize_model(model, collect(model, ids.split(512 // 64)))
    blob = (folder / "final_model.int6.ptz").read_bytes()
    assert tg.pack_artifact(tg.replace(h, compressor="zstd"), arrays) == blob
    env |= {"DATA_PATH": str(byte_corpus), "RUN_DIR": str(tmp_path / "again")}
    assert tg.main(["--quantize", str(folder)], env) == 0  # with the text after the last step
    assert (tmp_path / "again" / "final_model.int6.ptz").read_bytes() == blob
    seconds = json.loads((folder / "result.json").read_text())["seconds"]
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    trained = next(event["seconds"] for event in events if "val_loss" in event)
    if calib == "random":
        assert seconds["train"] == trained
    else:
        assert seconds["train"] - trained == pytest.approx(seconds["calibrate"], rel=0.2)


def test_the_head_is_quantized_by_the_inputs_it_reads():
    """With GPTQ_EMBED=1: the states after the last norm, for a tied table and for a head alone."""
    for tied, name in ((1, "tok_emb.weight"), (0, "lm_head.weight")):
        model, ids = random_model(tie_embeddings=tied, gptq_embed=1), some_ids(4, 64)
        hessian = collect(model, [ids])[name]
        states = model.states(ids).detach().double().flatten(0, 1)
        torch.testing.assert_close(hessian.double(), states.T @ states, rtol=1e-4, atol=1e-2)
        torch.testing.assert_close(model.logits(model.states(ids)), model.forward_logits(ids))
        solved, plain = quantize_model(model, {name: hessian}), quantize_model(model, {})
        changed = {n for n in plain if not torch.equal(plain[n], solved[n])}
        assert f"{name}.codes" in changed
        assert changed <= {f"{name}.codes", f"{name}.scales"}
