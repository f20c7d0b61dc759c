"""The model: sizes, a float64 reference, causality, initial weights, STP."""

import math

import pytest
import torch
from conftest import load, randomize, settings, trainer
from torch.nn import functional as F

import train_gpt as tg

# The published command of the byte-level model (PR #832).
BYTE_COMMAND = dict(
    pair.split("=")
    for pair in (
        "NUM_LAYERS=13 VOCAB_SIZE=260 MODEL_DIM=512 NUM_HEADS=8 NUM_KV_HEADS=4 MLP_MULT=2.0 "
        "TRAIN_SEQ_LEN=4096 TRAIN_BATCH_TOKENS=393216 BIGRAM_VOCAB_SIZE=4096 BIGRAM_DIM=32 "
        "XSA_LAST_N=4 EMA_ENABLED=1 EMA_DECAY=0.997 SWA_ENABLED=0 ROPE_DIMS=16 LN_SCALE=1 "
        "MUON_WD=0.04 ADAM_WD=0.04 MATRIX_LR=0.025 SCALAR_LR=0.025 TIED_EMBED_LR=0.035 "
        "MUON_MOMENTUM=0.99 MUON_MOMENTUM_WARMUP_START=0.92 MUON_MOMENTUM_WARMUP_STEPS=1500 "
        "WARMDOWN_ITERS=3000 ITERATIONS=9000 MAX_WALLCLOCK_SECONDS=600 EVAL_STRIDE=512 "
        "JEPA_CHUNK_SIZE=8 JEPA_LATENT_DIM=256 JEPA_PROJ_HIDDEN=256 JEPA_LAMBDA_MAX=0.001 "
        "JEPA_SIGREG_WEIGHT=0.02 JEPA_LR=0.001"
    ).split()
)
PR_1394 = {"LOOP_START": "4", "PARALLEL_RESIDUAL_START": "-1"}
BASELINE = {"NUM_LAYERS": "9", "MLP_MULT": "2", "BIGRAM_VOCAB_SIZE": "0", "VE_ENABLED": "0"}

# Each feature of the model and its losses, off and on.
FEATURES: dict[str, tuple[int, int]] = {
    "unet_skips": (0, 1),
    "smear_gate": (0, 1),
    "bos_mask": (0, 1),
    "ve_enabled": (0, 1),
    "ln_scale": (0, 1),
    "bigram_vocab_size": (0, 64),
    "xsa_last_n": (0, 2),
    "tie_embeddings": (0, 1),
    "jepa_chunk_size": (0, 4),
    "stp_enabled": (0, 1),
    "skip_gates_enabled": (0, 1),
    "num_loops": (0, 2),
    "parallel_residual_start": (-1, 1),
    "parallel_start_layer": (0, 2),
    "sparse_attn_gate_enabled": (0, 1),
}
OFF, ON = ({name: values[i] for name, values in FEATURES.items()} for i in (0, 1))
ONE_ON = [OFF | {name: ON[name]} for name in FEATURES]
ONE_OFF = [ON | {name: OFF[name]} for name in FEATURES]
BY_TOKEN = [features | {"smear_gate": 0, "smear_gate_enabled": 1} for features in (OFF, ON)]
every_feature = pytest.mark.parametrize("features", [OFF, ON, *ONE_ON, *ONE_OFF, *BY_TOKEN])


def some_ids(*shape: int, seed: int = 4) -> torch.Tensor:
    """Random bytes of text, no special ids."""
    return torch.randint(4, 260, shape, generator=torch.Generator().manual_seed(seed))


def random_model(dtype: torch.dtype = torch.float32, **changes: object) -> tg.GPT:
    """A tiny model with every parameter away from its start."""
    torch.manual_seed(0)
    narrow = {"jepa_latent_dim": 8, "jepa_proj_hidden": 12, "loop_start": 1, "loop_end": 1}
    return randomize(tg.GPT(settings(**narrow | changes), dtype=dtype)).eval()


CPU = tg.Device(torch.device("cpu"), torch.float32, compiled=False)


def auxiliary(model: tg.GPT, phase: tg.Phase, step: int = 0) -> tg.Auxiliary:
    """The inputs of the auxiliary losses of all rows of a step."""
    return tg.auxiliary_inputs(phase, model.h, step, slice(None), CPU)


# ---- Sizes and roles ----


@pytest.mark.parametrize(
    ("env", "parameters", "matrices"),
    [
        ({}, 26_993_756, 66),
        ({"PRESET": "v9"}, 26_993_756, 66),
        ({"BIGRAM_VOCAB_SIZE": "1536"}, 26_928_220, 66),
        ({"BIGRAM_VOCAB_SIZE": "3072", "BIGRAM_DIM": "112"}, 27_067_484, 66),
        (BASELINE | {"SMEAR_GATE": "0"}, 17_059_912, 54),
        (BYTE_COMMAND, 24_625_001, 78),
        (BYTE_COMMAND | {"JEPA_CHUNK_SIZE": "0"}, 24_165_993, 78),
        ({"TIE_EMBEDDINGS": "0"}, 26_993_756 + 512 * 1024, 66),  # ours: a head of its own
        ({"PRESET": "sp8192"}, 35_944_536, 66),  # PR #1493
        ({"PRESET": "sp8192", **PR_1394}, 35_943_512, 66),
        # PR #1855 has 48 more: scalars of two lanes in layers that have one.
        ({"PRESET": "frontier"}, 35_945_671 - 48, 66),
    ],
)
def test_published_models_have_their_number_of_parameters(env, parameters, matrices):
    with torch.device("meta"):
        model = tg.GPT(tg.Hyperparameters.from_env(env))
    assert sum(p.numel() for p in model.parameters()) == parameters
    roles = tg.parameter_roles(model)
    assert roles.keys() == dict(model.named_parameters()).keys()
    shapes = [model.get_parameter(n).shape for n, role in roles.items() if role == "matrix"]
    assert (len(shapes), len(set(shapes))) == (matrices, 4)  # Muon's stacks
    of_head = {role for name, role in roles.items() if name.startswith("jepa.")}
    assert of_head == ({"aux"} if model.jepa else set())


def test_the_byte_preset_is_the_published_command():
    preset = tg.Hyperparameters.from_env({"PRESET": "byte_jepa"})
    command = tg.Hyperparameters.from_env(BYTE_COMMAND)
    assert preset == tg.replace(command, preset="byte_jepa")


def test_a_parameter_without_a_role_is_an_error():
    class Gate(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

    parts = torch.nn.Sequential(Gate())
    with pytest.raises(AttributeError, match=r"^0\.weight: its module's role is None"):
        tg.parameter_roles(parts)


def test_initial_weights():
    torch.manual_seed(0)
    h = settings(qk_gain_init=1.7, num_layers=8, vocab_size=4096, model_dim=64)
    model, untied = tg.GPT(h), tg.GPT(tg.replace(h, tie_embeddings=False))
    block = model.blocks[3]
    for orthogonal, gain in (
        (block.attn.c_q, 1),
        (block.attn.c_k, 1),
        (block.attn.c_v, 1),
        (block.mlp.up, 1),
        (model.bigram.proj, 1 / 4),
        (model.value_embedding.proj, 1 / 4),
    ):
        singular = torch.linalg.svdvals(orthogonal.weight)
        torch.testing.assert_close(singular, torch.full_like(singular, gain))
    for zero in (block.attn.proj, block.mlp.down, model.bigram.embed, untied.lm_head):
        assert not zero.weight.any()
    assert model.tok_emb.weight.std().item() == pytest.approx(0.005, rel=0.02)
    assert untied.tok_emb.weight.std().item() == pytest.approx(1.0, rel=0.02)
    assert model.value_embedding.embed.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert (block.attn.q_gain == 1.7).all()
    assert torch.equal(block.resid_mix, torch.tensor([[1.0], [0.0]]).expand(2, 64))


# ---- The forward pass ----

# Features that the reference knows and TINY has.
REFERENCE_FEATURES = (
    "unet_skips smear_gate bos_mask ve_enabled ln_scale bigram_vocab_size xsa_last_n tie_embeddings"
).split()


LANES = "mean", "attn", "mlp"
FRONTIER = BY_TOKEN[1] | {"jepa_chunk_size": 0, "parallel_residual_start": 0}


def reference_logits(
    h: tg.Hyperparameters, w: dict[str, torch.Tensor], ids: list[int], window: int
) -> torch.Tensor:
    """The logits [T, V] by the published formulas with dense matrices, in float64."""
    length, layers, d, double = len(ids), h.num_layers, h.head_dim, torch.float64
    at = torch.arange(length, dtype=double)
    n = h.rope_dims or d
    reach = (window or length) / h.rope_train_seq_len
    base = h.rope_base * max(reach, 1) ** (n / (n - 2))
    angles = torch.outer(at, base ** (-torch.arange(0, n, 2, dtype=double) / n))
    turn = torch.polar(torch.ones_like(angles), -angles)[:, None]
    distance = at[:, None] - at
    hidden = (distance < 0) | (distance >= (window or length))
    kv_head = [i * h.num_kv_heads // h.num_heads for i in range(h.num_heads)]
    value_layers = [int(x) for x in h.ve_layers.split(",") if x] or range(layers)[-2:]
    value_layers = sorted(value_layers) if h.ve_enabled else []
    start, end = h.loop_start, h.loop_end + 1
    visits = [*range(layers)]
    if h.num_loops:
        visits = visits[:start] + visits[start:end] * (1 + h.num_loops) + visits[end:]
    half = len(visits) // 2

    def norm(x):
        return x / (x.square().mean(-1, keepdim=True) + 1.2e-7).sqrt()

    def rope(x):
        turned = torch.complex(x[..., : n // 2], x[..., n // 2 : n]) * turn
        return torch.cat((turned.real, turned.imag, x[..., n:]), dim=-1)

    fresh = [t == 0 or bool(h.bos_mask and token == 1) for t, token in enumerate(ids)]
    x = w["tok_emb.weight"][ids]
    if h.bigram_vocab_size:
        last = h.bigram_vocab_size - 1
        pairs = [(36313 * token) ^ (27191 * ids[t - 1]) for t, token in enumerate(ids)]
        rows = [last if first else pair % last for first, pair in zip(fresh, pairs, strict=True)]
        x = x + w["bigram.scale"] * w["bigram.embed.weight"][rows] @ w["bigram.proj.weight"].T
    if h.smear_gate_enabled:
        gate = (
            w["token_smear.scale"]
            * (x[:, : h.gate_window] @ w["token_smear.gate.weight"].T).sigmoid()
        )
        x = x + gate * x.roll(1, 0).masked_fill(torch.tensor(fresh)[:, None], 0)
    x = norm(x)
    if h.smear_gate:
        gate = w["smear.gate"].sigmoid()
        x = (1 - gate) * x + gate * x.roll(1, 0).masked_fill(torch.tensor(fresh)[:, None], 0)
    x0, outputs, lanes = x, [], [x]
    for visit, layer in enumerate(visits):
        b = {k.removeprefix(f"blocks.{layer}."): p for k, p in w.items()}
        scale = (layer + 1) ** -0.5 if h.ln_scale else 1.0
        if 0 < h.parallel_start_layer <= layer:
            lanes = [lanes[0], lanes[-1]]
        if h.unet_skips and half <= visit < 2 * half:
            skip = w["skip_weights"][visit - half] * outputs[2 * half - 1 - visit]
            if h.skip_gates_enabled:
                gate = w["skip_gates"][visit - half].sigmoid()
                lanes[0] = gate * lanes[0] + (1 - gate) * skip
            else:
                lanes[0] = lanes[0] + skip
        x = b["resid_mix"][0] * lanes[0] + b["resid_mix"][1] * x0
        y = norm(x) * scale
        q, k, v = (y @ b[f"attn.c_{name}.weight"].T for name in "qkv")
        if layer in value_layers:
            values = w["value_embedding.embed.weight"][ids] @ w["value_embedding.proj.weight"].T
            layer_scale = w["value_embedding.layer_scales"][value_layers.index(layer)]
            v = v + w["value_embedding.scale"] * layer_scale * values
        q, k, v = (p.view(length, -1, d) for p in (q, k, v))
        q, k, v = rope(norm(q)) * b["attn.q_gain"], rope(norm(k))[:, kv_head], v[:, kv_head]
        scores = torch.einsum("thd,shd->hts", q, k) / math.sqrt(d)
        share = scores.masked_fill(hidden, -math.inf).softmax(-1)
        y = torch.einsum("hts,shd->thd", share, v)
        if layer >= layers - h.xsa_last_n:
            y = y - (y * v).sum(-1, keepdim=True) / (v * v).sum(-1, keepdim=True) * v
        if h.sparse_attn_gate_enabled:
            gate = (norm(x) * scale)[:, : h.gate_window] @ b["attn.gate.weight"].T
            y = y * (h.sparse_attn_gate_scale * gate).sigmoid()[..., None]
        attention = b["attn_scale"] * (y.flatten(1) @ b["attn.proj.weight"].T)
        parallel = 0 <= h.parallel_residual_start <= layer
        read = lanes[1] if len(lanes) == 2 else x if parallel else x + attention
        u = norm(read) * scale @ b["mlp.up.weight"].T
        u = torch.where(u > 0, u, h.negative_slope * u) ** 2
        mlp = b["mlp_scale"] * (u @ b["mlp.down.weight"].T)
        if len(lanes) == 2:
            mixes = zip(b["lane_mix"], lanes, strict=True)
            lanes = [keep * lane + a * attention + m * mlp for (keep, a, m), lane in mixes]
        else:
            lanes = [x + attention + mlp]
        outputs.append(lanes[0])
    final = {"attn": lanes[0], "mlp": lanes[-1], "mean": sum(lanes) / len(lanes)}
    x = final[h.parallel_final_lane]
    head = w["tok_emb.weight"] if h.tie_embeddings else w["lm_head.weight"]
    return h.logit_softcap * torch.tanh(norm(x) @ head.T / h.logit_softcap)


@pytest.mark.parametrize(
    "changes",
    [
        OFF,
        {},
        *[{name: 0} for name in REFERENCE_FEATURES],
        {"xsa_last_n": 2},
        {"num_layers": 1},
        {"num_layers": 2, "xsa_last_n": 11, "rope_dims": 0},
        {"num_layers": 5, "rope_dims": 0, "rope_train_seq_len": 8},
        {"num_layers": 6, "ve_layers": "4,0", "negative_slope": 0},
        {"logit_softcap": 5, "num_kv_heads": 4, "rope_train_seq_len": 8},
        {"eval_window": 9},
        {"eval_window": 9, "rope_train_seq_len": 4},
        {"skip_gates_enabled": 1},
        {"num_loops": 2},
        {"num_loops": 1, "num_layers": 6, "loop_end": 3, "skip_gates_enabled": 1},
        {"parallel_residual_start": 1},
        {"sparse_attn_gate_enabled": 1, "sparse_attn_gate_scale": 0.5},
        {"smear_gate": 0, "smear_gate_enabled": 1, "gate_window": 5},
        *[{"parallel_start_layer": 2, "parallel_final_lane": name} for name in LANES],
        FRONTIER,
        FRONTIER | {"num_layers": 6, "parallel_start_layer": 4, "loop_end": 2},
    ],
)
def test_logits_and_gradients_equal_the_formulas_in_float64(changes):
    model = random_model(**changes | {"jepa_chunk_size": 0})
    ids, targets = some_ids(2, 20)
    ids[0] = ids[7] = 1  # BOS
    weights = {n: p.detach().double().requires_grad_() for n, p in model.named_parameters()}
    window = model.h.eval_window
    want = reference_logits(model.h, weights, ids.tolist(), window)
    got = model.forward_logits(ids[None], window=window)[0]
    torch.testing.assert_close(got.double(), want, atol=2e-4, rtol=1e-4)
    if window:  # of scoring alone
        return
    F.cross_entropy(want, targets).backward()
    loss = model(ids[None], targets[None])
    assert loss.item() == pytest.approx(F.cross_entropy(want, targets).item(), rel=1e-5)
    loss.backward()
    for name, p in model.named_parameters():
        if p.numel():  # without U-Net skips there are 0 skip weights
            error = (p.grad.double() - weights[name].grad).norm() / weights[name].grad.norm()
            assert error < 1e-3, name


@every_feature
def test_no_logit_depends_on_a_later_token(features):
    """Logits before a changed token stay equal bit for bit, with an attention window too."""
    model = random_model(**features)
    ids = some_ids(1, 48)
    ids[0, 20] = 1  # BOS
    for window in (0, 12):
        with torch.inference_mode():
            before = model.forward_logits(ids, window=window)
            for t in (1, 20, 31, 47):
                changed = ids.clone()
                changed[0, t] = 4 + (changed[0, t] + 100) % 256
                after = model.forward_logits(changed, window=window)
                assert torch.equal(before[:, :t], after[:, :t])
                assert not torch.equal(before[:, t], after[:, t])


@every_feature
def test_the_training_loss_is_its_weighted_terms_and_reaches_every_parameter(features):
    model = random_model(**features, jepa_lambda_max=0.5).train()
    ids, targets = some_ids(2, 16, 64)
    inputs = auxiliary(model, tg.programs(model.h)[-1])
    loss, terms = model.losses(ids, targets, inputs)
    weights = {"train_loss": 1.0}
    if features["jepa_chunk_size"]:
        weights |= {"jepa_error": 0.5, "jepa_sigreg": 0.5 * 0.02}
    if features["stp_enabled"]:
        weights |= {"stp": 0.05}
    assert list(terms) == list(weights)
    assert loss.item() == pytest.approx(sum(weights[n] * terms[n].item() for n in terms), rel=1e-6)
    without = auxiliary(model, tg.Phase(1.0, 0.9, 0.0))
    assert without.jepa_weight is None
    assert (without.stp_positions is None) == (not features["stp_enabled"])
    # A model that is called on ids and targets returns cross-entropy alone.
    assert model(ids, targets).item() == pytest.approx(terms["train_loss"].item(), rel=1e-6)
    if features["stp_enabled"]:
        gradient = torch.autograd.grad(terms["stp"], model.tok_emb.weight, retain_graph=True)
        assert gradient[0].any()
    loss.backward()
    for name, p in model.named_parameters():
        assert not p.numel() or (p.grad.isfinite().all() and p.grad.any()), name


def test_label_smoothing_equals_its_formula_in_float64_and_is_of_training_alone():
    model, (ids, targets) = random_model(label_smoothing=0.1).train(), some_ids(2, 2, 32)
    log_p = model.forward_logits(ids).double().log_softmax(-1)
    of_target = -log_p.gather(-1, targets.unsqueeze(-1)).mean()
    want = 0.9 * of_target - 0.1 * log_p.mean()
    assert model(ids, targets).item() == pytest.approx(want.item(), rel=1e-6)
    model.eval()
    loss, terms = model.losses(ids, targets)
    assert list(terms) == ["train_loss"]
    for scored in (model(ids, targets), loss):
        assert scored.item() == pytest.approx(of_target.item(), rel=1e-6)


@pytest.mark.fault(55)
@pytest.mark.parametrize("feature", ["smear_gate", "bigram_vocab_size"])
@pytest.mark.parametrize("bos_mask", [0, 1])
def test_the_embedding_of_a_bos_ignores_the_document_before_it(feature, bos_mask):
    model = random_model(**OFF | {feature: ON[feature], "bos_mask": bos_mask})
    x = model.embed(torch.tensor([[1, 50, 60, 1, 70], [1, 50, 61, 1, 70]]))
    assert torch.allclose(x[0, 3], x[1, 3], atol=1e-6) == bool(bos_mask)
    assert torch.allclose(x[0, 3], x[0, 0]) == bool(bos_mask)


def test_the_last_positions_are_the_last_rows_of_all_and_float32():
    model, ids = random_model(), some_ids(2, 32)
    last, whole = model.forward_logits(ids, last=5), model.forward_logits(ids)
    torch.testing.assert_close(last, whole[:, -5:], atol=1e-5, rtol=1e-5)
    half = random_model(torch.bfloat16)
    assert half.backbone(ids).dtype == torch.bfloat16
    assert half.forward_logits(ids).dtype == torch.float32
    assert {p.dtype for p in half.parameters()} == {torch.float32}


def test_the_bigram_table_learns_from_the_second_step_on():
    torch.manual_seed(0)
    model = tg.GPT(settings())
    optimizers = tg.Optimizers(model, model.h, tg.Ranks())
    model(*some_ids(2, 2, 64)).backward()
    optimizers.step(tg.Phase(1.0, 0.9, 0.0))
    model(*some_ids(2, 2, 64)).backward()
    assert all(p.grad.any() for p in model.bigram.parameters())


# ---- Semantic Tube Prediction ----


def reference_stp(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The STP loss, one sequence at a time."""
    losses = []
    for row, (s, r, t) in zip(states, positions.tolist(), strict=True):
        a, b = row[t] - row[r], row[r] - row[s]
        losses.append(1 - (a @ b) / ((a @ a).sqrt() * (b @ b).sqrt()))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stp_and_its_gradient_equal_a_float64_loop(dtype):
    states = torch.randn(3, 12, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    positions = torch.tensor([[0, 4, 9], [2, 3, 11], [0, 1, 2]])
    loss = tg.stp_loss(states.requires_grad_(), positions)
    exact = states.detach().double().requires_grad_()
    want = reference_stp(exact, positions)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    loss.backward()
    want.backward()
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(states.grad.double(), exact.grad, atol=tolerance, rtol=tolerance)


def test_stp_of_constant_states_is_one_with_a_finite_gradient():
    states = torch.ones(1, 12, 8, requires_grad=True)
    loss = tg.stp_loss(states, torch.tensor([[0, 4, 9]]))
    loss.backward()
    assert loss.item() == pytest.approx(1.0)
    assert states.grad.isfinite().all()


@pytest.mark.parametrize("length", [3, 4, 64])
def test_stp_positions_rise_reach_every_token_and_follow_from_seed_and_step(length):
    h = settings(stp_enabled=1, train_seq_len=length, train_batch_tokens=length * 8)

    def positions(step: int, seed: int = 1337, rows: slice = slice(None)) -> torch.Tensor:
        seeded = tg.replace(h, seed=seed)
        return tg.auxiliary_inputs(tg.programs(seeded)[0], seeded, step, rows, CPU).stp_positions

    steps = [positions(step) for step in range(200)]
    assert {p.shape for p in steps} == {(8, 3)}
    assert all((p.diff(dim=1) > 0).all() for p in steps)
    assert torch.cat(steps).unique().tolist() == list(range(length))
    assert torch.equal(steps[5], positions(5))
    if length > 4:
        assert not torch.equal(steps[5], steps[6])
        assert not torch.equal(steps[5], positions(5, seed=7))
    parts = [positions(5, rows=slice(start, start + 2)) for start in (0, 2, 4, 6)]
    assert torch.equal(torch.cat(parts), steps[5])
    h = tg.replace(h, stp_lambda=0)
    assert positions(5) is None


def test_micro_batches_change_no_jepa_loss(byte_corpus, cpu):
    """A step of AdamW with an epsilon of 1 moves the weights by about their gradient.

    SIGReg is of the latents of a part: equal sequences in each make the parts nearly equal.
    """
    linear = {"adam_eps": 1, "grad_clip_norm": 0, "adam_wd": 0, "jepa_lr": 1, "jepa_chunk_size": 4}
    ids, targets = (x.repeat(8, 1) for x in some_ids(2, 2, 64))
    found = []
    for micro in (1024, 128):
        model = random_model(data_path=byte_corpus, micro_batch_tokens=micro, **linear)
        start = model.jepa.projector[0].weight.detach().clone()
        run = trainer(model, load(model.h), cpu)
        terms = run.take_step(tg.Phase(1.0, 0.9, 1.0), ids, targets)
        found.append((terms, model.jepa.projector[0].weight.detach() - start))
    (terms, change), (terms_of_parts, change_of_parts) = found
    torch.testing.assert_close(terms, terms_of_parts, atol=0, rtol=0.05)
    assert change.norm() > 0
    assert (change - change_of_parts).norm() < 0.1 * change.norm()
