"""The model: sizes, definitions in float64, causality, documents, layer order, head, STP."""

import itertools
import math

import pytest
import torch
from conftest import BYTE_TABLE, load, randomize, score, settings, trainer

import train_gpt as tg

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
}


def combinations() -> list[dict[str, int]]:
    """All features off, all on, each one on alone, each one off alone, and each pair on."""
    off = {name: values[0] for name, values in FEATURES.items()}
    on = {name: values[1] for name, values in FEATURES.items()}
    sets = [off, on]
    sets += [off | {name: on[name]} for name in FEATURES]
    sets += [on | {name: off[name]} for name in FEATURES]
    sets += [off | {a: on[a], b: on[b]} for a, b in itertools.combinations(FEATURES, 2)]
    return sets


def meta_model(**env: str) -> tg.GPT:
    with torch.device("meta"):
        return tg.GPT(tg.Hyperparameters.from_env(env))


BYTE_COMMAND = dict(
    pair.split("=")
    for pair in (
        "NUM_LAYERS=13 VOCAB_SIZE=260 MODEL_DIM=512 NUM_HEADS=8 NUM_KV_HEADS=4 MLP_MULT=2.0 "
        "TRAIN_SEQ_LEN=4096 TRAIN_BATCH_TOKENS=393216 BIGRAM_VOCAB_SIZE=4096 BIGRAM_DIM=32 "
        "XSA_LAST_N=4 EMA_ENABLED=1 EMA_DECAY=0.997 SWA_ENABLED=0 ROPE_DIMS=16 LN_SCALE=1 "
        "MUON_WD=0.04 ADAM_WD=0.04 MATRIX_LR=0.025 SCALAR_LR=0.025 TIED_EMBED_LR=0.035 "
        "MUON_MOMENTUM=0.99 MUON_MOMENTUM_WARMUP_START=0.92 MUON_MOMENTUM_WARMUP_STEPS=1500 "
        "WARMDOWN_ITERS=3000 ITERATIONS=9000 MAX_WALLCLOCK_SECONDS=600 EVAL_STRIDE=512"
    ).split()
)


@pytest.mark.parametrize(
    ("env", "parameters"),
    [
        (
            {
                "NUM_LAYERS": "9",
                "MLP_MULT": "2",
                "BIGRAM_VOCAB_SIZE": "0",
                "VE_ENABLED": "0",
                "SMEAR_GATE": "0",
            },
            17_059_912,
        ),
        ({}, 26_993_756),
        ({"PRESET": "v9"}, 26_993_756),
        ({"VE_ENABLED": "0"}, 26_829_913),
        ({"BIGRAM_VOCAB_SIZE": "1536"}, 26_928_220),
        ({"BIGRAM_VOCAB_SIZE": "3072", "BIGRAM_DIM": "112"}, 27_067_484),
        ({"BIGRAM_VOCAB_SIZE": "2816", "BIGRAM_DIM": "112"}, 27_038_812),
        (BYTE_COMMAND, 24_165_993),
        (BYTE_COMMAND | {"JEPA_CHUNK_SIZE": "8"}, 24_625_001),
        ({"TIE_EMBEDDINGS": "0"}, 26_993_756 + 512 * 1024),  # ours: a head of its own
    ],
)
def test_published_parameter_counts(env: dict[str, str], parameters: int):
    assert sum(p.numel() for p in meta_model(**env).parameters()) == parameters


@pytest.mark.parametrize(("env", "matrices"), [({}, 66), (BYTE_COMMAND, 78)])
def test_muon_holds_exactly_the_block_matrices_in_four_stacks(env, matrices):
    model = meta_model(**env)
    roles = tg.parameter_roles(model)
    assert roles.keys() == dict(model.named_parameters()).keys()
    shapes = [model.get_parameter(n).shape for n, role in roles.items() if role == "matrix"]
    assert len(shapes) == matrices
    assert len(set(shapes)) == 4


def test_a_parameter_without_a_role_is_refused():
    class Gate(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

    with pytest.raises(AttributeError, match="Gate has role 'none', not one of"):
        tg.parameter_roles(Gate())


def test_class_or_instance_builds_and_starts_near_uniform():
    class Small(tg.Hyperparameters):
        num_layers, model_dim, num_heads, num_kv_heads, vocab_size = 2, 64, 4, 2, 512

    torch.manual_seed(0)
    ids, targets = torch.randint(512, (2, 2, 64))
    loss = tg.GPT(Small)(ids, targets)
    assert loss.dtype == torch.float32
    assert abs(loss.item() - math.log(512)) < 0.1


def reference_logits(model: tg.GPT, ids: list[int]) -> torch.Tensor:
    """The model from its formulas, one token and one head at a time, in float64."""
    h = model.h
    w = {name: p.detach().double() for name, p in model.named_parameters()}
    d, group = h.model_dim // h.num_heads, h.num_heads // h.num_kv_heads

    def norm(x):
        return x / (x.square().mean() + 1.2e-7).sqrt()

    def scale(n):
        return 1 / math.sqrt(n + 1) if h.ln_scale else 1.0

    def rope(x, t):
        base, rope_dims = h.rope_base, h.rope_dims or d
        if len(ids) > h.rope_train_seq_len:
            exponent = rope_dims / (rope_dims - 2)
            base *= (len(ids) / h.rope_train_seq_len) ** exponent
        x, half = x.clone(), rope_dims // 2
        for i in range(half):
            angle = t * base ** (-2 * i / rope_dims)
            a, b = x[i].clone(), x[i + half].clone()
            x[i] = a * math.cos(angle) + b * math.sin(angle)
            x[i + half] = b * math.cos(angle) - a * math.sin(angle)
        return x

    stream = []
    for t, token in enumerate(ids):
        fresh = t == 0 or (h.bos_mask and token == tg.BOS_ID)
        last = h.bigram_vocab_size - 1
        bucket = last if fresh else ((36313 * token) ^ (27191 * ids[t - 1])) % last
        bigram = w["bigram.proj.weight"] @ w["bigram.embed.weight"][bucket]
        stream.append(norm(w["tok_emb.weight"][token] + w["bigram.scale"] * bigram))
    gate = w["smear.gate"].sigmoid()
    smeared = []
    for t, token in enumerate(ids):
        fresh = t == 0 or (h.bos_mask and token == tg.BOS_ID)
        smeared.append((1 - gate) * stream[t] + (0 if fresh else gate * stream[t - 1]))
    xs, x0s, outputs = smeared, smeared, []
    for n in range(h.num_layers):
        b = f"blocks.{n}."
        half = h.num_layers // 2
        if h.unet_skips and half <= n < 2 * half:
            early = outputs[2 * half - 1 - n]
            xs = [x + w["skip_weights"][n - half] * e for x, e in zip(xs, early, strict=True)]
        mix = w[b + "resid_mix"]
        xs = [mix[0] * x + mix[1] * x0 for x, x0 in zip(xs, x0s, strict=True)]
        qs, ks, vs = [], [], []
        for t, x in enumerate(xs):
            x = norm(x) * scale(n)
            q = (w[b + "attn.c_q.weight"] @ x).view(-1, d)
            k = (w[b + "attn.c_k.weight"] @ x).view(-1, d)
            v = w[b + "attn.c_v.weight"] @ x
            if h.ve_enabled and n >= h.num_layers - 2:
                value = w["value_embedding.embed.weight"][ids[t]]
                value = w["value_embedding.proj.weight"] @ value * w["value_embedding.scale"]
                v = v + value * w["value_embedding.layer_scales"][n - h.num_layers + 2]
            gain = w[b + "attn.q_gain"]
            qs.append([rope(norm(q[i]), t) * gain[i] for i in range(h.num_heads)])
            ks.append([rope(norm(k[i]), t) for i in range(h.num_kv_heads)])
            vs.append(v.view(-1, d))
        after = []
        for t, x in enumerate(xs):
            heads = []
            for i in range(h.num_heads):
                scores = torch.stack([qs[t][i] @ ks[s][i // group] for s in range(t + 1)])
                share = (scores / math.sqrt(d)).softmax(0)
                y = sum(share[s] * vs[s][i // group] for s in range(t + 1))
                own = vs[t][i // group]
                xsa = n >= h.num_layers - h.xsa_last_n
                heads.append(y - xsa * (y @ own) / (own @ own) * own)
            x = x + w[b + "attn_scale"] * (w[b + "attn.proj.weight"] @ torch.cat(heads))
            u = w[b + "mlp.up.weight"] @ (norm(x) * scale(n))
            u = torch.where(u > 0, u, h.negative_slope * u) ** 2
            after.append(x + w[b + "mlp_scale"] * (w[b + "mlp.down.weight"] @ u))
        xs = after
        outputs.append(xs)
    head = w["tok_emb.weight"] if h.tie_embeddings else w["lm_head.weight"]
    logits = torch.stack([head @ norm(x) for x in xs])
    return h.logit_softcap * torch.tanh(logits / h.logit_softcap)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_train_seq_len": 8},
        {"rope_dims": 0, "rope_train_seq_len": 8},
        {"negative_slope": 0},
        {"ln_scale": 0, "unet_skips": 0},
        {"xsa_last_n": 2, "ve_enabled": 0, "bos_mask": 0},
        {"logit_softcap": 5, "num_kv_heads": 4},
        {"tie_embeddings": 0},
    ],
)
def test_logits_equal_the_formulas_in_float64(changes):
    model = randomize(tg.GPT(settings(**{"num_layers": 5, **changes})), seed=3)
    ids = torch.randint(4, 260, (20,), generator=torch.Generator().manual_seed(0)).tolist()
    ids[0] = ids[7] = tg.BOS_ID
    got = model.forward_logits(torch.tensor([ids]))[0].double()
    torch.testing.assert_close(got, reference_logits(model, ids), atol=2e-4, rtol=1e-4)


def test_the_loss_is_the_mean_cross_entropy():
    model = randomize(tg.GPT(settings()))
    ids, targets = torch.randint(4, 260, (2, 3, 20))
    chances = model.forward_logits(ids).double().softmax(-1)
    want = -chances.gather(-1, targets[..., None]).log().mean()
    assert model(ids, targets).item() == pytest.approx(want.item(), rel=1e-6)


def test_activations_have_their_dtype_and_weights_stay_float32():
    model = randomize(tg.GPT(settings(), dtype=torch.bfloat16))
    ids = torch.randint(4, 260, (1, 8))
    assert model.backbone(ids).dtype == torch.bfloat16
    assert model.forward_logits(ids).dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_initial_weights():
    torch.manual_seed(0)
    h = settings(qk_gain_init=1.7, num_layers=8, vocab_size=4096, model_dim=64)
    model = tg.GPT(h)
    block = model.blocks[3]
    for orthogonal, gain in (
        (block.attn.c_q, 1),
        (block.attn.c_k, 1),
        (block.mlp.up, 1),
        (model.bigram.proj, 1 / 4),
        (model.value_embedding.proj, 1 / 4),
    ):
        singular = torch.linalg.svdvals(orthogonal.weight)
        torch.testing.assert_close(singular, torch.full_like(singular, gain))
    assert not block.attn.proj.weight.any()
    assert not block.mlp.down.weight.any()
    assert not model.bigram.embed.weight.any()
    assert model.tok_emb.weight.std().item() == pytest.approx(0.005, rel=0.02)
    assert model.value_embedding.embed.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert (block.attn.q_gain == 1.7).all()
    assert torch.equal(block.resid_mix, torch.tensor([[1.0], [0.0]]).expand(2, 64))


def test_last_positions_are_the_last_rows_of_all():
    model = randomize(tg.GPT(settings()))
    ids = torch.randint(4, 260, (2, 32))
    torch.testing.assert_close(
        model.forward_logits(ids, last=5), model.forward_logits(ids)[:, -5:], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("features", combinations(), ids=lambda f: "".join(map(str, f.values())))
def test_no_logit_depends_on_a_later_token(features):
    """Logits before a changed token stay equal bit for bit."""
    model = randomize(tg.GPT(settings(jepa_latent_dim=8, jepa_proj_hidden=8, **features))).eval()
    ids = torch.randint(1, 260, (1, 48), generator=torch.Generator().manual_seed(5))
    ids[0, 20] = tg.BOS_ID
    with torch.inference_mode():
        before = model.forward_logits(ids)
        for t in (1, 20, 47):
            changed = ids.clone()
            changed[0, t] = 3 + (changed[0, t] + 100) % 256
            after = model.forward_logits(changed)
            assert torch.equal(before[:, :t], after[:, :t])
            assert not torch.equal(before[:, t], after[:, t])


@pytest.mark.parametrize("features", combinations(), ids=lambda f: "".join(map(str, f.values())))
def test_training_reaches_every_parameter(features):
    """The loss is the weighted sum of its terms, and its gradient reaches every parameter."""
    h = settings(jepa_latent_dim=8, jepa_proj_hidden=8, **features)
    model = randomize(tg.GPT(h)).train()
    ids, targets = torch.randint(1, 260, (2, 16, 64), generator=torch.Generator().manual_seed(5))
    inputs = tg.auxiliary_inputs(tg.programs(h)[-1], h, 0, torch.device("cpu"), tg.Ranks())
    loss, terms = model.losses(ids, targets, inputs)
    weights = {"train_loss": 1.0}
    if h.jepa_chunk_size:
        weights |= {"jepa_error": 0.001, "jepa_sigreg": 0.001 * 0.02}
    if h.stp_enabled:
        weights |= {"stp": 0.05}
    assert list(terms) == list(weights)
    assert loss.item() == pytest.approx(sum(weights[n] * terms[n].item() for n in terms), rel=1e-6)
    loss.backward()
    for name, p in model.named_parameters():
        if p.numel():  # without U-Net skips there are 0 skip weights
            assert p.grad.isfinite().all(), name
            assert p.grad.any(), name


def test_an_uncausal_attention_would_be_caught():
    def peeks(q, k, v, *, window=0):
        return tg.attend_sdpa(q, k, v) + v.mean(1, keepdim=True).repeat_interleave(2, dim=2)

    model = randomize(tg.GPT(settings(), attend=peeks))
    ids = torch.randint(1, 260, (1, 16))
    changed = ids.clone()
    changed[0, -1] = 5 + (changed[0, -1] + 9) % 250
    assert not torch.equal(model.forward_logits(ids)[:, 0], model.forward_logits(changed)[:, 0])


@pytest.mark.fault(55)
@pytest.mark.parametrize("bos_mask", [0, 1])
def test_what_a_bos_position_gets_ignores_the_document_before(bos_mask):
    h = settings(bos_mask=bos_mask)
    smear, bigram = randomize(tg.SmearGate(h)), randomize(tg.BigramHash(h))
    ids = torch.tensor([[1, 50, 60, 1, 70, 80]])
    other = torch.tensor([[1, 50, 61, 1, 70, 80]])
    x = torch.randn(1, 6, h.model_dim)
    x_other = x.clone()
    x_other[0, 2] += 1
    same_smear = torch.equal(smear(x, ids)[:, 3], smear(x_other, other)[:, 3])
    same_bigram = torch.equal(bigram(ids)[:, 3], bigram(other)[:, 3])
    assert (same_smear, same_bigram) == (bool(bos_mask), bool(bos_mask))
    # The first position of a sequence gets what a BOS within it gets.
    assert torch.equal(bigram(ids)[:, 0], bigram(ids)[:, 3]) == bool(bos_mask)


@pytest.mark.parametrize("bigram_dim", [8, 32])  # 32 is the model's width: no projection
def test_bigram_learns_from_the_second_step_on(bigram_dim):
    h = settings(bigram_dim=bigram_dim)
    torch.manual_seed(0)
    model = tg.GPT(h)
    optimizers = tg.Optimizers(model, h, tg.Ranks())
    for step in range(2):
        ids, targets = torch.randint(4, 260, (2, 2, 64))
        model(ids, targets).backward()
        if step:
            grads = [p.grad.abs().max() for p in model.bigram.parameters()]
            assert all(g > 0 for g in grads)
        optimizers.step(tg.Phase(1.0, 0.9, 0.0, 0.0))


def test_value_embeddings_are_where_they_are_asked_for():
    def value_layers(**changes: object) -> list[int]:
        return tg.ValueEmbedding(settings(**changes)).layers

    assert value_layers(num_layers=11) == [9, 10]
    assert value_layers(num_layers=13) == [11, 12]
    assert value_layers(num_layers=1) == [0]
    assert value_layers(num_layers=3, ve_layers="2,0") == [0, 2]
    assert tg.GPT(settings(ve_enabled=0)).value_embedding is None


def test_xsa_is_in_the_last_layers_only():
    model = tg.GPT(settings(num_layers=4, xsa_last_n=3))
    assert [block.attn.xsa for block in model.blocks] == [False, True, True, True]
    assert all(b.attn.xsa for b in tg.GPT(settings(num_layers=2, xsa_last_n=11)).blocks)


# ---- The order of the layers ----


@pytest.mark.parametrize(
    ("layers", "encoder", "decoder"),
    [
        (1, [], [0]),
        (2, [0], [1]),
        (9, [0, 1, 2, 3], [4, 5, 6, 7, 8]),
        (11, [0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 10]),
        (13, [0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11, 12]),
    ],
)
def test_the_plan_visits_every_block_once_in_two_halves(layers, encoder, decoder):
    h = settings(num_layers=layers, ve_enabled=0)
    plan = tg.layer_plan(h)
    assert (list(plan.encoder), list(plan.decoder)) == (encoder, decoder)
    assert len(tg.GPT(h).skip_weights) == len(encoder)


@pytest.mark.parametrize(
    ("layers", "pairs"),
    [
        (1, {}),
        (2, {1: 0}),
        (9, {4: 3, 5: 2, 6: 1, 7: 0}),
        (11, {5: 4, 6: 3, 7: 2, 8: 1, 9: 0}),
        (13, {6: 5, 7: 4, 8: 3, 9: 2, 10: 1, 11: 0}),
    ],
)
def test_a_decoder_block_reads_the_output_of_its_encoder_block(layers, pairs):
    """Pairs of the published U-Net; a block without a pair reads the block before alone."""
    model = randomize(tg.GPT(settings(num_layers=layers)))
    inputs, outputs = [], []

    def keep(_, arguments, lanes):
        inputs.append(arguments[0][0])
        outputs.append(lanes[0])

    for block in model.blocks:
        block.register_forward_hook(keep)
    ids = torch.randint(4, 260, (2, 8))
    states = model.backbone(ids)
    assert len(inputs) == layers
    assert torch.equal(inputs[0], model.embed(ids))
    assert torch.equal(states, outputs[-1])
    for n in range(1, layers):
        want = outputs[n - 1]
        if n in pairs:
            want = want + model.skip_weights[n - layers // 2] * outputs[pairs[n]]
        torch.testing.assert_close(inputs[n], want)


# ---- A head of its own ----


def test_an_untied_head_starts_at_zero_and_has_rates_of_its_own():
    h = settings(tie_embeddings=0, embed_lr=0.5, head_lr=0.004)
    torch.manual_seed(0)
    model = tg.GPT(h)
    ids, targets = torch.randint(4, 260, (2, 2, 32))
    assert model(ids, targets).item() == pytest.approx(math.log(260), rel=1e-6)
    assert model.tok_emb.weight.std().item() == pytest.approx(1.0, rel=0.05)
    groups = tg.Optimizers(model, h, tg.Ranks()).adamw.param_groups
    rates = {id(p): (g["base_lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert rates[id(model.lm_head.weight)] == (0.004, 0.0)
    assert rates[id(model.tok_emb.weight)] == (0.5, h.adam_wd)
    assert rates[id(model.bigram.embed.weight)] == (0.5, h.adam_wd)
    model(ids, targets).backward()
    assert model.lm_head.weight.grad.any()
    assert tg.GPT(settings()).lm_head is None


# ---- Semantic Tube Prediction ----

STP_PHASE = tg.Phase(1.0, 0.9, 0.0, 0.3)


def stp_inputs(h: tg.Hyperparameters, step: int, rank: int = 0, world: int = 1) -> tg.StpInputs:
    """The inputs of the STP loss of a step on one of several ranks."""
    ranks = tg.Ranks(rank, world)
    return tg.auxiliary_inputs(STP_PHASE, h, step, torch.device("cpu"), ranks).stp


def reference_stp(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The STP loss one sequence and one dimension at a time, in float64."""
    losses = []
    for row, (s, r, t) in zip(states.double(), positions.tolist(), strict=True):
        dot = first = second = torch.zeros((), dtype=torch.float64)
        for i in range(row.size(1)):
            a, b = row[t, i] - row[r, i], row[r, i] - row[s, i]
            dot, first, second = dot + a * b, first + a * a, second + b * b
        losses.append(1 - dot / (first.sqrt() * second.sqrt()))
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


def test_stp_of_a_path_that_stands_still_is_one_with_a_finite_gradient():
    still = torch.ones(1, 12, 8, requires_grad=True)
    loss = tg.stp_loss(still, torch.tensor([[0, 4, 9]]))
    loss.backward()
    assert loss.item() == pytest.approx(1.0)
    assert still.grad.isfinite().all()


def test_stp_positions_rise_and_follow_from_seed_and_step():
    h = settings(stp_enabled=1)
    inputs = stp_inputs(h, 5)
    s, r, t = inputs.positions.unbind(1)
    assert inputs.positions.shape == (16, 3)
    assert ((s >= 0) & (s < r) & (r < t) & (t < h.train_seq_len)).all()
    assert torch.equal(inputs.positions, stp_inputs(h, 5).positions)
    assert not torch.equal(inputs.positions, stp_inputs(h, 6).positions)
    assert not torch.equal(inputs.positions, stp_inputs(tg.replace(h, seed=7), 5).positions)


@pytest.mark.parametrize("length", [3, 4, 64])
def test_stp_positions_reach_every_position_of_a_sequence(length):
    h = settings(stp_enabled=1, train_seq_len=length, train_batch_tokens=length * 8)
    positions = torch.cat([stp_inputs(h, step).positions for step in range(200)])
    assert (positions.diff(dim=1) > 0).all()
    assert positions.unique().tolist() == list(range(length))


@pytest.mark.parametrize("world", [2, 4])
def test_stp_takes_the_same_positions_of_a_sequence_on_any_number_of_ranks(world, byte_corpus):
    h = settings(stp_enabled=1, data_path=byte_corpus)
    stream, step = load(h).train.stream, 3

    def of_ranks(world: int) -> list[torch.Tensor]:
        """Sequences and positions of a step, from all ranks together."""
        parts = []
        for rank in range(world):
            ranks = tg.Ranks(rank, world)
            batches = tg.TrainingBatches(stream, h.train_batch_tokens, h.train_seq_len, ranks)
            parts.append((batches.batch(step)[0], stp_inputs(h, step, rank, world).positions))
        return [torch.cat(part) for part in zip(*parts, strict=True)]

    for one, several in zip(of_ranks(1), of_ranks(world), strict=True):
        assert torch.equal(one, several)


@pytest.mark.parametrize(("world", "micro"), [(1, 64), (1, 256), (2, 512), (4, 128)])
def test_stp_is_the_same_in_parts_of_a_step(world, micro, byte_corpus, cpu):
    """The terms and gradients of all ranks and micro-batches add up to those of the whole step."""

    def step_of(world: int, micro: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        h = settings(stp_enabled=1, data_path=byte_corpus, micro_batch_tokens=micro)
        data, sums, gradient = load(h), {}, 0
        for rank in range(world):
            ranks = tg.Ranks(rank, world)
            batches = tg.replace(data.train, ranks=ranks)
            torch.manual_seed(0)
            model = randomize(tg.GPT(h))
            steps = tg.Trainer(model, data._replace(train=batches), h, ranks, cpu, tg.Log())
            steps.optimizers.step = lambda _: None  # the gradient stays
            for name, term in steps.take_step(STP_PHASE, *batches.batch(0)).items():
                sums[name] = sums.get(name, 0) + term
            gradient = gradient + steps.optimizers.gradient
        return sums, gradient

    whole, gradient = step_of(1, 1024)
    parts, gradient_of_parts = step_of(world, micro)
    assert list(whole) == list(parts) == ["train_loss", "stp"]
    for name, term in whole.items():
        assert parts[name].item() == pytest.approx(term.item(), rel=1e-5)
    assert (gradient_of_parts - gradient).norm() < 1e-5 * gradient.norm()


def test_stp_adds_its_weighted_term_in_training_and_trains_the_backbone():
    h = settings(stp_enabled=1)
    model = randomize(tg.GPT(h))
    ids, targets = torch.randint(4, 260, (2, 16, 64))
    stp = stp_inputs(h, 0)
    assert stp.weight.item() == pytest.approx(0.3)
    loss, terms = model.losses(ids, targets, tg.AuxiliaryInputs(stp=stp))
    want = terms["train_loss"] + 0.3 * terms["stp"]
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)
    assert model(ids, targets).item() == pytest.approx(terms["train_loss"].item(), rel=1e-6)
    terms["stp"].backward()
    assert model.blocks[0].attn.c_v.weight.grad.any()
    assert model.tok_emb.weight.grad.any()


def test_an_stp_weight_of_zero_leaves_loss_and_gradient_unchanged():
    h = settings(stp_enabled=1)
    model = randomize(tg.GPT(h))
    ids, targets = torch.randint(4, 260, (2, 16, 64))
    zero = stp_inputs(h, 0)._replace(weight=torch.tensor(0.0))
    found = []
    for inputs in (tg.NO_AUXILIARY, tg.AuxiliaryInputs(stp=zero)):
        model.zero_grad()
        loss, _ = model.losses(ids, targets, inputs)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_stp_lambda_of_zero_trains_as_without_stp(byte_corpus, cpu):
    found = []
    for changes in ({}, {"stp_enabled": 1, "stp_lambda": 0}, {"stp_enabled": 1}):
        h = settings(data_path=byte_corpus, iterations=4, **changes)
        torch.manual_seed(0)
        steps = trainer(tg.GPT(h), load(h), h, cpu)
        steps.train()
        found.append(steps.step_log.losses)
    without, at_zero, at_default = found
    assert at_zero == without
    assert at_default[0] == without[0]  # the loss that is logged is cross-entropy
    assert at_default != without


def test_stp_changes_no_score(cpu):
    text = torch.randint(4, 260, (700,), generator=torch.Generator().manual_seed(4)).int()
    val = tg.Validation(text, BYTE_TABLE, canonical=False)
    found = []
    for stp in (0, 1):
        h = settings(stp_enabled=stp, stp_lambda=1)
        torch.manual_seed(0)
        model = randomize(tg.GPT(h)).eval()
        passes = [tg.plain_pass(model.forward_logits, h), tg.sliding_pass(model.forward_logits, h)]
        passes.append(tg.one_pass(model, 16, cpu))
        found.append([score(scoring_pass, val, cpu).nats for scoring_pass in passes])
    assert found[0] == found[1]
