"""GPTQ against the paper's elimination in float64, its calibration, and what it may read."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, load, randomize, settings

import train_gpt as tg

# ---- The reference ----


def correlated(rows: int, cols: int, seed: int) -> torch.Tensor:
    """Inputs [rows, cols] that depend on each other and differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(cols, cols, generator=generator) / cols**0.5
    x = torch.randn(rows, cols, generator=generator) @ (mix + 0.3 * torch.eye(cols))
    return x * (0.1 + torch.rand(cols, generator=generator))


def problem(n: int, rows: int, cols: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A stack of weights [n, rows, cols] and one of X^T X."""
    weight = torch.randn(n, rows, cols, generator=torch.Generator().manual_seed(seed)) * 0.05
    inputs = torch.stack([correlated(3 * cols, cols, seed + 10 * i) for i in range(n)])
    return weight, inputs.mT @ inputs


def eliminate(
    row: np.ndarray, inverse: np.ndarray, order: list[int], scale: float, limit: int
) -> tuple[list[int], float, float]:
    """Codes of one row, its error by the Hessian, and how near a value came to a code's border.

    Optimal brain quantization in a fixed order: round a weight, let the free ones make up for it,
    and take it out of the inverse Hessian by Gaussian elimination.
    """
    row, inverse, codes, error, nearest = row.copy(), inverse.copy(), [0] * len(row), 0.0, 0.5
    for i in order:
        value = row[i] / scale
        codes[i] = max(-limit, min(limit, round(value)))
        if abs(value) < limit + 0.5:
            nearest = min(nearest, abs(abs(value) % 1 - 0.5))
        delta = (row[i] - codes[i] * scale) / inverse[i, i]
        error += delta**2 * inverse[i, i]
        row -= delta * inverse[i]
        inverse -= np.outer(inverse[i], inverse[i]) / inverse[i, i]
        inverse[i, i] = 1.0  # of a weight that is done: not read again
    return codes, error, nearest


def reference(
    weight: torch.Tensor, hessian: torch.Tensor, bits: int, factor: float, damping: float
) -> tuple[list[list[int]], list[float], list[bool]]:
    """Codes and scales of a matrix, and the rows in which float32 can decide nothing otherwise.

    Those have no value within 0.0002 of a code's border, nor a second clip that is nearly as good.
    """
    limit = 2 ** (bits - 1) - 1
    h = hessian.double().numpy().copy()
    diagonal = h.diagonal().copy()
    order = sorted(range(len(h)), key=lambda i: -diagonal[i])
    inverse = np.linalg.inv(h + damping * diagonal.mean() * np.eye(len(h)))
    codes, scales, sure = [], [], []
    for row in weight.double().numpy():
        tries = []
        for clip in tg.CLIP_RATIOS:
            scale = float(np.float16(np.abs(row).max() * clip / limit))
            live = np.where(diagonal == 0, 0.0, row)
            tries.append((*eliminate(live, inverse, order, scale, limit), scale))
        best, second = sorted(tries, key=lambda t: t[1])[:2]
        if factor > 1:  # it multiplies the scale of least error
            scale = float(np.float16(best[3] * factor))
            best = (*eliminate(live, inverse, order, scale, limit), scale)
            tries.append(best)
            best = (best[0], 0.0, *best[2:])
        codes.append(best[0])
        scales.append(best[3])
        sure.append(min(t[2] for t in tries) > 0.0002 and second[1] > 1.001 * best[1])
    return codes, scales, sure


def weighted(codes: torch.Tensor, scales: torch.Tensor, weight: torch.Tensor, hessian) -> float:
    """tr(E H E^T) in float64, E the error of the weights."""
    e = codes.double() * scales.double()[..., None] - weight.double()
    return ((e @ hessian.double()) * e).sum().item()


def check(found, weight, hessian, bits, factor=1.0, damping=0.01) -> None:
    """Code for code where that is certain, and as good an error everywhere."""
    codes, scales = found
    want_codes, want_scales, sure = reference(weight, hessian, bits, factor, damping)
    assert sum(sure) >= 0.6 * len(sure)  # else there would be nothing to compare
    for n in range(len(sure)):
        if sure[n]:
            assert scales[n].item() == want_scales[n]
            assert codes[n].tolist() == want_codes[n]
    want = torch.tensor(want_codes), torch.tensor(want_scales)
    damped = hessian.double() + damping * hessian.diagonal().mean() * torch.eye(len(hessian))
    limit = weighted(*want, weight, damped)
    assert weighted(codes, scales, weight, damped) == pytest.approx(limit, rel=0.02)


# ---- GPTQ itself ----


@pytest.mark.parametrize(
    ("n", "rows", "cols", "bits", "factor"),
    [(1, 8, 9, 6, 1.0), (3, 10, 24, 6, 1.0), (2, 8, 37, 6, 1.3), (2, 12, 16, 8, 1.0)],
)
def test_it_is_the_papers_elimination_code_for_code(monkeypatch, n, rows, cols, bits, factor):
    monkeypatch.setattr(tg, "GPTQ_BLOCK", 8)  # for several blocks, and a part of one
    weight, hessian = problem(n, rows, cols)
    codes, scales, failed = tg.quantize_gptq(bits, factor, weight, hessian)
    assert codes.dtype == torch.int8
    assert not failed.any()
    for i in range(n):
        check((codes[i], scales[i]), weight[i], hessian[i], bits, factor)
        one = slice(i, i + 1)
        alone, alone_scales, _ = tg.quantize_gptq(bits, factor, weight[one], hessian[one])
        check((alone[0], alone_scales[0]), weight[i], hessian[i], bits, factor)


def test_blocks_change_nothing(monkeypatch):
    weight, hessian = problem(2, 8, 40, seed=3)
    found = []
    for block in (1, 16, 128):
        monkeypatch.setattr(tg, "GPTQ_BLOCK", block)
        found.append(tg.quantize_gptq(6, 1.0, weight, hessian)[0])
    assert (found[0] != found[2]).float().mean() < 0.01  # but for sums in another order
    assert (found[1] != found[2]).float().mean() < 0.01


@pytest.mark.parametrize("bits", [6, 8])
def test_with_an_identity_for_hessian_it_is_rounding(bits):
    weight, _ = problem(2, 16, 48)
    eye = torch.eye(48).expand(2, -1, -1)
    codes, scales, failed = tg.quantize_gptq(bits, 1.0, weight, 7.0 * eye)
    want_codes, want_scales, _ = tg.quantize_rounding(bits, 1.0, weight, None)
    assert not failed.any()
    assert torch.equal(codes, want_codes)
    assert torch.equal(scales, want_scales)


@pytest.mark.parametrize("seed", range(5))
def test_its_error_by_the_hessian_is_below_roundings(seed):
    weight, hessian = problem(3, 24, 32, seed)
    solved = tg.quantize_gptq(6, 1.0, weight, hessian)
    rounded = tg.quantize_rounding(6, 1.0, weight, hessian)
    for i in range(3):
        got, plain = (
            weighted(codes[i], scales[i], weight[i], hessian[i])
            for codes, scales, _ in (solved, rounded)
        )
        assert got < 0.9 * plain


@pytest.mark.fault(41)
def test_inputs_that_are_always_zero_get_no_codes():
    weight, hessian = problem(2, 12, 24)
    hessian[0, [3, 20]] = 0
    hessian[0, :, [3, 20]] = 0
    codes, scales, failed = tg.quantize_gptq(6, 1.0, weight, hessian)
    assert not failed.any()
    assert not codes[0][:, [3, 20]].any()
    assert codes[1][:, [3, 20]].any()
    live = hessian[0].diagonal() > 0
    # What is dead changes nothing but, by the mean of the diagonal, the damping.
    check((codes[0], scales[0]), weight[0], hessian[0], 6)
    assert codes[0][:, live].any(0).all()


def indefinite(least: float, cols: int = 16) -> torch.Tensor:
    """Symmetric, its diagonal's mean 1, its least eigenvalue given."""
    generator = torch.Generator().manual_seed(2)
    basis = torch.linalg.qr(torch.randn(cols, cols, generator=generator, dtype=torch.float64))[0]
    values = torch.full((cols,), (cols - least) / (cols - 1), dtype=torch.float64)
    values[0] = least
    return (basis * values @ basis.T).float()


@pytest.mark.fault(42)
@pytest.mark.parametrize(("least", "damping"), [(-0.05, 0.1), (-0.5, 1.0), (-5.0, 10.0)])
def test_damping_rises_tenfold_until_it_helps(least, damping):
    weight, good = problem(1, 12, 16)
    stack = torch.stack((indefinite(least), good[0]))
    codes, scales, failed = tg.quantize_gptq(6, 1.0, weight.repeat(2, 1, 1), stack)
    assert not failed.any()
    check((codes[0], scales[0]), weight[0], stack[0], 6, damping=damping)
    check((codes[1], scales[1]), weight[0], good[0], 6)  # its neighbour's trouble is not its own


def broken_hessians(cols: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    dead_and_bad = torch.zeros(cols, cols)
    dead_and_bad[2:, 2:] = indefinite(-20.0, cols - 2)
    one_nan = problem(1, 1, cols)[1][0]
    one_nan[1, 0] = one_nan[0, 1] = torch.nan
    return {
        "indefinite": indefinite(-20.0, cols),
        "indefinite with dead columns": dead_and_bad,
        "NaN": torch.full((cols, cols), torch.nan),
        "one NaN": one_nan,
        "infinite": torch.full((cols, cols), torch.inf),
        "zero": torch.zeros(cols, cols),
        "negative": -torch.eye(cols) - torch.rand(cols, cols, generator=generator).mul(0.1),
    }


@pytest.mark.fault(42)
def test_what_cannot_be_solved_is_rounded_and_its_stack_is_not(monkeypatch):
    monkeypatch.setattr(tg, "GPTQ_BLOCK", 8)
    bad = broken_hessians(16)
    weight, hessian = problem(len(bad) + 2, 12, 16)
    hessian[1:-1] = torch.stack([*bad.values()])
    codes, scales, failed = tg.quantize_gptq(6, 1.0, weight, hessian)
    assert failed.tolist() == [False, *[True] * len(bad), False]
    want_codes, want_scales, _ = tg.quantize_rounding(6, 1.0, weight, None)
    assert torch.equal(codes[1:-1], want_codes[1:-1])
    assert torch.equal(scales[1:-1], want_scales[1:-1])
    for i in (0, -1):
        check((codes[i], scales[i]), weight[i], hessian[i], 6)
        assert not torch.equal(codes[i], want_codes[i])


def test_a_constant_input_of_two_kinds_is_solved():
    """Perfectly correlated inputs: singular without damping."""
    weight, _ = problem(1, 12, 16)
    x = correlated(64, 16, 0)
    x[:, 8:] = x[:, :8]
    codes, scales, failed = tg.quantize_gptq(6, 1.0, weight, (x.mT @ x)[None])
    assert not failed.any()
    rounded, rounded_scales, _ = tg.quantize_rounding(6, 1.0, weight, None)
    got = weighted(codes[0], scales[0], weight[0], x.mT @ x)
    assert got < 0.5 * weighted(rounded[0], rounded_scales[0], weight[0], x.mT @ x)


# ---- The artifact's arrays ----


@pytest.fixture
def model() -> tg.GPT:
    torch.manual_seed(0)
    return randomize(tg.GPT(settings())).eval()


def collect(model: tg.GPT, batches) -> dict[str, torch.Tensor]:
    """Hessians of all batches."""
    hessians, used = tg.collect_hessians(model, batches, tg.Ranks())
    assert used == len(batches)
    return hessians


def ids_of(*shape: int, seed: int = 4) -> torch.Tensor:
    return torch.randint(4, 260, shape, generator=torch.Generator().manual_seed(seed))


def test_hessians_change_codes_and_no_layout(model):
    hessians = collect(model, [ids_of(8, 64)])
    plain, failed = tg.quantize_model(model, {}, tg.Ranks())
    solved, also_failed = tg.quantize_model(model, hessians, tg.Ranks())
    assert (failed, also_failed) == ([], [])
    with torch.device("meta"):
        meta = tg.artifact_layout(tg.GPT(model.h))
    layouts = [[(n, a.shape, a.dtype) for n, a in x.items()] for x in (plain, solved, meta)]
    assert layouts[0] == layouts[1] == layouts[2]
    changed = {name.removesuffix(".codes") for name in plain if name.endswith(".codes")}
    changed = {n for n in changed if not torch.equal(plain[f"{n}.codes"], solved[f"{n}.codes"])}
    assert changed == hessians.keys()
    assert len(changed) == 18


def test_each_matrix_gets_what_it_would_alone(model):
    hessians = collect(model, [ids_of(8, 64)])
    arrays, _ = tg.quantize_model(model, hessians, tg.Ranks())
    for name in ("blocks.0.attn.c_q.weight", "blocks.2.attn.c_q.weight", "blocks.1.mlp.up.weight"):
        weight = model.state_dict()[name]
        codes, scales, _ = tg.quantize_gptq(6, 1.0, weight[None], hessians[name][None])
        same = (codes[0] == arrays[f"{name}.codes"]).float().mean()
        assert same > 0.995  # all but those that the order of a sum may decide
        torch.testing.assert_close(scales[0], arrays[f"{name}.scales"])


@pytest.mark.fault(42)
def test_tensors_that_are_only_rounded_are_named(model, tmp_path, capsys):
    hessians = collect(model, [ids_of(8, 64)])
    bad = ["blocks.0.attn.c_q.weight", "blocks.2.mlp.down.weight"]
    hessians[bad[0]] = torch.zeros(32, 32)
    hessians[bad[1]] = torch.full((96, 96), torch.nan)
    assert sorted(tg.quantize_model(model, hessians, tg.Ranks())[1]) == bad
    tg.pack_to_fit(model, hessians, model.h, 10**6, tg.Ranks(), tg.Log())
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.split()[1] for line in lines if "is rounded" in line) == bad


# ---- Hessians ----


def own_sums(model: tg.GPT, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """X^T X in float64 of the inputs of every Linear of the blocks, by hooks of the test."""
    sums, hooks = {}, []
    for name, module in model.blocks.named_modules(prefix="blocks"):
        if isinstance(module, torch.nn.Linear):

            def keep(_, args, __, name=name):
                x = args[0].detach().double().flatten(0, -2)
                sums[f"{name}.weight"] = x.T @ x

            hooks.append(module.register_forward_hook(keep))
    with torch.no_grad():
        model.backbone(ids)
    for hook in hooks:
        hook.remove()
    return sums


@pytest.mark.parametrize("changes", [{}, {"jepa_chunk_size": 4}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hessians_are_sums_over_all_inputs(changes, dtype):
    """In float32 even where the activations are bf16."""
    torch.manual_seed(0)
    model = randomize(tg.GPT(settings(**changes), dtype=dtype)).eval()
    ids = ids_of(8, 64)
    want = own_sums(model, ids)
    whole = collect(model, [ids])
    roles = tg.parameter_roles(model)
    matrices = {name for name, role in roles.items() if role == "matrix"}
    assert whole.keys() == want.keys() == matrices
    parts = collect(model, [ids[:1], ids[1:6], ids[6:]])
    for name, sums in want.items():
        size = sums.abs().max().item()
        assert whole[name].dtype == torch.float32
        torch.testing.assert_close(whole[name].double(), sums, atol=1e-5 * size, rtol=1e-4)
        # Parts of another size are multiplied in another order, which bf16 shows.
        near = 1e-5 if dtype == torch.float32 else 0.02
        torch.testing.assert_close(parts[name], whole[name], atol=near * size, rtol=1e-4)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.fault(26)
@pytest.mark.parametrize(
    ("left", "batch_seconds", "takes", "used"),
    [
        (10.0, 0.0, 3.0, 3),  # the fourth would end at 12
        (10.0, 6.0, 1.0, 5),  # by the 6 s of a step, the sixth could end at 11
        (10.0, 11.0, 1.0, 0),
        (0.5, 0.0, 1.0, 1),
        (-1.0, 0.0, 1.0, 0),
    ],
)
def test_no_batch_is_read_that_could_end_too_late(
    left, batch_seconds, takes, used, model, monkeypatch
):
    batches, read = [ids_of(2, 64, seed=n) for n in range(6)], []
    backbone = model.backbone

    def timed(ids):
        read.append(ids)
        return backbone(ids)

    monkeypatch.setattr(model, "backbone", timed)
    hessians, count = tg.collect_hessians(
        model, batches, tg.Ranks(), lambda: left - takes * len(read), batch_seconds
    )
    assert count == len(read) == used
    monkeypatch.undo()
    want = collect(model, batches[:used]) if used else {}
    assert hessians.keys() == want.keys()
    assert all(torch.equal(hessians[name], want[name]) for name in want)


# ---- Calibration ----


def calibrate(
    model: tg.GPT, batches: tg.TrainingBatches | None, monkeypatch, step: int = 0, **changes: object
) -> torch.Tensor:
    """The tokens by which a run calibrates its quantizer."""
    h = settings(gptq_calib_tokens=330, micro_batch_tokens=128, gptq_enabled=1, **changes)
    text = []

    def collected(model, batches, *_, **__):
        text.extend(batches)
        return {}, len(batches)

    monkeypatch.setattr(tg, "collect_hessians", collected)
    run = tg.Run({}, tg.Log(), {})
    run.h, run.data = h, tg.Data(None, batches)
    device = tg.Device(torch.device("cpu"), torch.float32, compiled=False)
    run.calibrate(model, tg.TrainingClock(device, tg.Ranks()), step)
    assert [batch.shape for batch in text] == [(2, 64), (2, 64), (1, 64)]
    assert {batch.dtype for batch in text} == {torch.int64}
    return torch.cat(text)


def test_random_text_has_no_special_ids_and_repeats_by_seed(model, monkeypatch):
    first = calibrate(model, None, monkeypatch)
    assert (first.min(), first.max()) >= (4, 255)
    assert first.max() < 260
    assert torch.equal(first, calibrate(model, None, monkeypatch, step=7))
    assert not torch.equal(first, calibrate(model, None, monkeypatch, seed=5))
    assert len(first.unique()) > 150


def test_training_text_is_what_the_next_step_would_read(byte_corpus, model, monkeypatch):
    stream = tg.TokenStream(byte_corpus, "train", 260)
    batches = tg.TrainingBatches(stream, 1024, 64, tg.Ranks())
    for step in (0, 9):
        rows = calibrate(model, batches, monkeypatch, step, gptq_calib="train")
        assert torch.equal(rows, batches.batch(step)[0][:5])
        assert torch.equal(rows.flatten(), stream.read(step * 1024, 5 * 64))


# ---- From the last step to the artifact ----


class Sealed:
    """The validation tokens, which fail whoever touches them before they are opened."""

    def __init__(self, val: torch.Tensor) -> None:
        self.inside = {"val": val, "open": False}

    def __getattr__(self, name: str):
        if not self.inside["open"]:
            raise AssertionError(f"validation data were used: {name}")
        return getattr(self.inside["val"], name)

    def __len__(self) -> int:
        return self.__getattr__("__len__")()

    def __getitem__(self, key: object) -> torch.Tensor:
        return self.__getattr__("__getitem__")(key)

    def __iter__(self):
        return self.__getattr__("__iter__")()


@pytest.fixture
def saved(model, tmp_path) -> Path:
    """The weights of the model as a run saves them."""
    path = tmp_path / "final_model.safetensors"
    tg.write_tensors(path, model.state_dict(), tg.model_settings(model.h))
    return path


def quantize_sealed(saved: Path, env: dict, monkeypatch, cheat=None) -> dict:
    """The result of --quantize on validation data that are sealed until the artifact is written.

    A cheat calibrates on what it makes of them.
    """
    folder = saved.parent / "run"
    env = {**TINY, "GPTQ_ENABLED": "1", "EVAL_STRIDE": "0", "RUN_DIR": str(folder), **env}
    load_data, write, opened = tg.load_data, tg.write_atomically, []

    def load_sealed(*args, **options):
        data = load_data(*args, **options)
        sealed = Sealed(data.val.tokens)
        opened.append(sealed)
        return data._replace(val=data.val._replace(tokens=sealed))

    def write_and_open(path, blob):
        write(path, blob)
        opened[0].inside["open"] |= path.name == tg.ARTIFACT

    with monkeypatch.context() as patch:
        patch.setattr(tg, "load_data", load_sealed)
        patch.setattr(tg, "write_atomically", write_and_open)
        if cheat:
            patch.setattr(tg, "random_sequences", lambda *_: cheat(opened[0]))
        status = tg.main(["--quantize", str(saved)], env)
    result = json.loads((folder / "result.json").read_text())
    assert tg.EXIT_STATUS[result["status"]] == status
    return result


@pytest.mark.parametrize("calib", ["random", "train"])
def test_validation_data_cannot_reach_the_artifact(calib, byte_corpus, saved, monkeypatch):
    env = {"DATA_PATH": str(byte_corpus), "GPTQ_CALIB": calib, "GPTQ_CALIB_TOKENS": "128"}
    solved, quantize = [], tg.quantize_model

    def noted(model, hessians, *rest):
        solved.append(len(hessians))
        return quantize(model, hessians, *rest)

    monkeypatch.setattr(tg, "quantize_model", noted)
    result = quantize_sealed(saved, env, monkeypatch)
    assert result["status"] == "ok"
    assert solved == [18]
    assert result["scores"].keys() == {"float", "plain"}


@pytest.mark.parametrize(
    "use", [lambda v: v.long(), lambda v: v[:64], len, torch.as_tensor, list, np.asarray]
)
def test_any_use_of_validation_data_before_it_would_be_caught(use, byte_corpus, saved, monkeypatch):
    result = quantize_sealed(saved, {"DATA_PATH": str(byte_corpus)}, monkeypatch, cheat=use)
    assert result["status"] == "failed"
    assert "AssertionError: validation data were used" in result["reason"]
    assert not (saved.parent / "run" / tg.ARTIFACT).exists()


def test_the_matrices_are_solved_and_the_tables_rounded(byte_corpus, model, saved, tmp_path):
    folder = tmp_path / "run"
    env = {"DATA_PATH": str(byte_corpus), "RUN_DIR": str(folder), "EVAL_STRIDE": "0"}
    env |= {"GPTQ_ENABLED": "1", "GPTQ_CALIB_TOKENS": "256"}
    assert tg.main(["--quantize", str(saved)], {**TINY, **env}) == 0
    _, arrays = tg.unpack_artifact((folder / tg.ARTIFACT).read_bytes(), settings())
    for name, bits in (("tok_emb.weight", 8), ("blocks.1.attn.proj.weight", 6)):
        rounded, _, _ = tg.quantize_rounding(bits, 1.0, model.state_dict()[name][None], None)
        assert torch.equal(arrays[f"{name}.codes"], rounded[0]) == (bits == 8)


@pytest.mark.parametrize(
    ("calib", "reserve", "collecting", "steps", "seconds", "status"),
    [
        ("train", 6, 5.0, 13, 18.0, "ok"),  # 20 less the reserve; a step takes 1
        ("train", 12, 5.0, 7, 12.0, "ok"),  # less is left than is reserved
        ("train", 6, 9.0, 13, 22.0, "over a limit"),
        ("random", 6, 9.0, 19, 19.0, "ok"),  # no training data, no training time
    ],
)
def test_reading_training_data_is_training_time(
    calib, reserve, collecting, steps, seconds, status, byte_corpus, tmp_path, monkeypatch
):
    now = [0.0]
    monkeypatch.setattr(tg.time, "perf_counter", lambda: now[0])
    take_step, collect_hessians, text = tg.Trainer.take_step, tg.collect_hessians, []

    def timed(*arguments):
        now[0] += 1.0
        return take_step(*arguments)

    def collected(model, batches, *rest):
        now[0] += collecting
        text.extend(batches)
        return collect_hessians(model, batches, *rest)

    monkeypatch.setattr(tg.Trainer, "take_step", timed)
    monkeypatch.setattr(tg, "collect_hessians", collected)
    folder = tmp_path / "run"
    changes = {
        "data_path": byte_corpus,
        "run_dir": folder,
        "iterations": 1000,
        "max_wallclock_seconds": 20,
        "gptq_enabled": 1,
        "gptq_calib": calib,
        "gptq_reserve_seconds": reserve,
        "gptq_calib_tokens": 128,
        "eval_stride": 0,
    }
    env = {**TINY, **{name.upper(): str(value) for name, value in changes.items()}}
    assert tg.main([], env) == tg.EXIT_STATUS[status]
    result = json.loads((folder / "result.json").read_text())
    assert (result["steps"], result["seconds"]["train"]) == (steps, seconds)
    assert result["status"] == status
    assert result["seconds"]["calibrate"] == collecting
    told = "raise GPTQ_RESERVE_SECONDS" in (folder / "train.log").read_text()
    assert told == (status != "ok")
    data = load(settings(**changes))
    unread = data.train.batch(steps)[0][:2]  # text of the step that was not taken
    assert torch.equal(torch.cat(text), unread) == (calib == "train")
