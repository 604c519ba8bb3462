"""Claims about ar_model.py: golden vectors, causality, exact probabilities, the plain sampler."""
import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import ar_model
from support import runtime
import sample as fast_sampler
from ar_model import ARConfig, ARModel, sample, sampling_settings
from helpers import fill_module, golden, published_ar_name, refused

GOLDEN_CONFIG = ARConfig(width=64, heads=2, inter_blocks=2, intra_blocks=2, grid=(4, 4), num_classes=10)

SHAPES = {
    "M = 1": {"bits": (7,)}, "M = 2": {"bits": (3, 5)}, "M = 3": {"bits": (3, 2, 4)},
    "M = 4": {"bits": (2, 3, 2, 4)}, "three axes": {"bits": (3, 5), "grid": (2, 3, 4)},
    "separate heads": {"bits": (3, 5), "separate_heads": True},
    "unconditional": {"bits": (3, 5), "num_classes": 0}}


def small_config(**changes):
    """A transformer of milliseconds; dropout of activations off."""
    shape = dict(width=48, heads=2, inter_blocks=2, intra_blocks=2, bits=(3, 5), grid=(3, 5), num_classes=4,
                 ffn_multiple=16, token_dropout=0.0, attention_dropout=0.0, ffn_dropout=0.0)
    return ARConfig(**{**shape, **changes})


def build(config):
    """A model with weights that make its predictions depend on everything (fresh heads are zero)."""
    return fill_module(ARModel(config), "", published_ar_name)


def random_tokens(config, batch, seed=0):
    """Random sub-tokens, M x (batch, N), and labels (batch,)."""
    generator = torch.Generator().manual_seed(seed)
    size = (batch, config.tokens)
    subtokens = [torch.randint(2 ** bits, size, generator=generator) for bits in config.bits]
    return subtokens, torch.randint(max(1, config.num_classes), (batch,), generator=generator)


def noise_of(model, batch):
    """Noise of one number for every draw (N, M, batch)."""
    return fast_sampler.noise_of(range(batch), model.config.tokens, len(model.config.bits))


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture(params=SHAPES, ids=lambda name: name.replace(" ", ""))
def shape(request):
    return small_config(**SHAPES[request.param])


# ---- tokens -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bits", [(18,), (6, 12), (9, 9), (1, 17), (3, 2, 5, 8)])
def test_sub_tokens_are_slices_of_the_bits_in_channel_order(bits):
    ids = torch.arange(2 ** 18)
    subtokens = ar_model.ids_to_subtokens(ids, bits)
    assert torch.equal(ar_model.subtokens_to_ids(subtokens, bits), ids)
    channels = ids[..., None] >> torch.arange(18) & 1
    for count, subtoken, own in zip(bits, subtokens, channels.split(bits, dim=-1)):
        assert torch.equal(subtoken, (own << torch.arange(count)).sum(-1))


# ---- parity -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("greedy", [{"temperature": 0}, {"top_k": 1}])
def test_logits_and_greedy_sampling_with_guidance_are_the_golden_ones(greedy):
    expected, model = golden("ar_model"), build(GOLDEN_CONFIG)
    with torch.no_grad():
        logits = model([expected["sub_index_6"], expected["sub_index_12"]], expected["label"])
    torch.testing.assert_close(logits[0], expected["logits_6"], atol=1e-5, rtol=0)
    torch.testing.assert_close(logits[1], expected["logits_12"], atol=1e-5, rtol=0)
    settings = sampling_settings(2, cfg_scale=(1.7, 1.8), **greedy)
    tokens = [expected["greedy_cfg_1p7_1p8_6"], expected["greedy_cfg_1p7_1p8_12"]]
    assert equal(sample(model, expected["label"], noise_of(model, 2), settings), tokens)
    for prepare in (lambda model: model, fast_sampler.prepare_for_sampling):
        sampler = fast_sampler.Sampler(prepare(model), 2, settings)
        assert equal(sampler(expected["label"], [0, 1]), tokens)


# ---- layers and training ----------------------------------------------------------------------------------

@pytest.mark.parametrize("grid, head_dim, shares", [((4, 6), 32, (8, 8)), ((2, 3, 5), 32, (5, 5, 6)),
                                                    ((2, 3, 5), 24, (4, 4, 4))])
def test_each_axis_turns_its_own_share_of_the_channel_pairs(grid, head_dim, shares):
    table = ar_model.rope_table(grid, head_dim)[:, 0]
    assert table.shape == (1 + math.prod(grid), head_dim // 2, 2) and not table[0].any()      # the class
    assert torch.equal(table[1], torch.tensor([1.0, 0.0]).expand_as(table[1]))
    for n, cell in enumerate(np.ndindex(*grid)):
        angles = np.concatenate([x * 10000.0 ** (-np.arange(p) / p) for x, p in zip(cell, shares)])
        np.testing.assert_allclose(table[1 + n], np.stack([np.cos(angles), np.sin(angles)], -1), atol=1e-6)


def test_the_real_and_the_complex_form_of_rotation_agree():
    x, rope = torch.randn(2, 15, 2, 24), ar_model.rope_table((3, 5), 24)[1:]
    compiled = torch.compile(ar_model.rotate, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, rope), ar_model.rotate(x, rope), atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(6, 1), (2, 3, 2), (2, 3, 5), (6, 8), (2, 3, 9), (2, 40)], ids=str)
def test_attention_written_out_for_few_positions_is_that_of_the_kernel(shape):
    q, k, v = torch.randn(3, *shape, 2, 8).unbind(0)                   # (..., L, H, d)
    expected = F.scaled_dot_product_attention(*(z.transpose(-3, -2) for z in (q, k, v)), is_causal=True)
    torch.testing.assert_close(ar_model.attention(q, k, v), expected.transpose(-3, -2), atol=1e-6, rtol=0)


def test_norms_are_computed_in_float32():
    norm, x = ar_model.RMSNorm(64), torch.randn(5, 64) * 300           # the squares overflow float16
    assert norm(x.half()).isfinite().all()
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(norm(x), expected, atol=1e-6, rtol=1e-5)


def test_a_changed_sub_token_changes_nothing_before_it(shape):
    model, (subtokens, labels) = build(shape), random_tokens(shape, 2)
    t, M = shape.tokens // 2, len(shape.bits)
    with torch.no_grad():
        before = model(subtokens, labels)
        for m in range(M):
            changed = [ids.clone() for ids in subtokens]
            changed[m][:, t] ^= 1
            after = model(changed, labels)
            for j in range(M):
                # Sub-tokens up to m see nothing of it; with separate heads those behind it do not either.
                own = t + 1 if j <= m or shape.separate_heads else t
                assert torch.equal(after[j][:, :own], before[j][:, :own])
                assert not torch.isclose(after[j][:, own], before[j][:, own]).all(dim=-1).any()


def test_the_loss_is_the_mean_negative_log_probability(shape):
    subtokens, labels = random_tokens(shape, 3)
    total, terms = ARModel(shape)(subtokens, labels, return_loss=True)   # at first, all are equally likely
    torch.testing.assert_close(terms, math.log(2) * torch.tensor(shape.bits, dtype=torch.float32))
    torch.testing.assert_close(total, terms.sum())
    model = build(shape)
    total, terms = model(subtokens, labels, return_loss=True)
    for z, ids, term in zip(model(subtokens, labels), subtokens, terms):
        expected = -z.double().log_softmax(-1).gather(-1, ids[..., None]).mean()
        assert abs(term - expected) < 1e-5
    assert total.requires_grad and not terms.requires_grad


def test_every_parameter_gets_a_gradient_through_ddp(shape):
    runtime.setup_process_group("cpu")                                 # unless a script in this process did
    model, (subtokens, labels) = ARModel(shape).train(), random_tokens(shape, 3)
    DistributedDataParallel(model)(subtokens, labels, return_loss=True)[0].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_dropped_labels_become_no_class_in_training_only():
    config = small_config(label_dropout=1.0)
    model, (subtokens, labels) = build(config), random_tokens(config, 2)
    with torch.no_grad():
        with_class = model(subtokens, labels)
        without = model(subtokens, torch.full_like(labels, config.num_classes))
        dropped = model.train()(subtokens, labels)
    assert equal(dropped, without) and not equal(dropped, with_class)


@pytest.mark.parametrize("dropout", ["token_dropout", "attention_dropout", "ffn_dropout"])
def test_dropout_acts_in_training_and_follows_the_seed(dropout):
    config = small_config(label_dropout=0.0, **{dropout: 0.5})
    model, (subtokens, labels) = build(config), random_tokens(config, 2)

    def logits(seed):
        torch.manual_seed(seed)
        with torch.no_grad():
            return model(subtokens, labels)

    assert equal(logits(0), logits(1))                                  # eval mode
    model.train()
    assert equal(logits(0), logits(0)) and not equal(logits(0), logits(1))


def test_activation_checkpointing_changes_no_gradient(shape):
    config = dataclasses.replace(shape, token_dropout=0.1, attention_dropout=0.1, ffn_dropout=0.1)
    subtokens, labels = random_tokens(config, 2)
    gradients = []
    for checkpointing in (False, True):
        model = build(config).train()
        model.checkpointing = checkpointing
        torch.manual_seed(0)
        model(subtokens, labels, return_loss=True)[0].backward()
        gradients.append([p.grad for p in model.parameters()])
    assert equal(*gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_training_stays_close_to_float32(shape, dtype):
    model, (subtokens, labels) = build(shape), random_tokens(shape, 4)
    expected, _ = model(subtokens, labels, return_loss=True)
    with torch.autocast("cpu", dtype=dtype):
        total, terms = model(subtokens, labels, return_loss=True)
    total.backward()
    assert total.dtype == torch.float32 and abs(total - expected) < 0.02 * expected
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("changes, word", [
    ({"heads": 5}, "width"), ({"heads": 0}, "heads"), ({"bits": ()}, "bits"), ({"bits": (6, 0)}, "bits"),
    ({"grid": (0, 4)}, "grid"), ({"ffn_dropout": 2}, "ffn"), ({"intra_blocks": 0}, "intra_blocks"),
    ({"num_classes": -1}, "num_classes"), ({"label_dropout": math.nan}, "label_dropout"),
    ({"bits": (1, 1, 1), "grid": (1, 1)}, "sub-tokens")])
def test_impossible_shapes_are_clear_errors(changes, word):
    refused(word, small_config, **changes, kind=ValueError)
    for ids in ([torch.zeros(1, 3).long()], [torch.zeros(1, 16).long()] * 2):
        refused("for a model of 2 x 15", build(small_config()), ids, torch.zeros(1).long(), kind=ValueError)


# ---- drawing ----------------------------------------------------------------------------------------------

def test_greedy_sampling_is_the_argmax_of_guided_logits(shape):
    scale = 2.5 if shape.num_classes else 1.0                           # else nothing to guide towards
    model, (_, labels) = build(shape), random_tokens(shape, 3)
    settings = sampling_settings(len(shape.bits), cfg_scale=scale, temperature=0)
    tokens = sample(model, labels, noise_of(model, 3), settings)
    with torch.no_grad():
        conditional = model(tokens, labels)
        unconditional = model(tokens, torch.full_like(labels, shape.num_classes))
    for c, u, ids in zip(conditional, unconditional, tokens):
        assert torch.equal((u + scale * (c - u)).argmax(-1), ids)


def test_guidance_extrapolates_and_at_1_is_none_bit_for_bit():
    logits = torch.randn(8, 50) * 10
    assert torch.equal(ar_model.guide(logits, 1.0), logits[:4])
    assert torch.equal(ar_model.guide(logits, 0.0), logits[4:])
    torch.testing.assert_close(ar_model.guide(logits, 3.0), logits[4:] + 3 * (logits[:4] - logits[4:]))


def test_top_k_1_is_greedy_also_among_ties():
    logits = torch.randint(0, 3, (200, 40)).float()
    greedy = F.one_hot(logits.argmax(-1), 40).float()
    for settings in ({"temperature": 0}, {"temperature": 1e-30}, {"top_k": 1}):
        assert torch.equal(ar_model.probabilities(logits, **settings), greedy)


def numpy_probabilities(logits, temperature, top_k, top_p):
    """The definition, entry by entry, in float64."""
    result = np.zeros(logits.shape)
    for row, out in zip(logits.astype(np.float64), result):
        kept = sorted(range(len(row)), key=lambda i: (-row[i], i))[:top_k or len(row)]
        p = np.exp((row[kept] - row.max()) / temperature)
        p /= p.sum()
        size = 1
        while size < len(p) and p[:size].sum() < top_p:
            size += 1
        out[kept[:size]] = p[:size] / p[:size].sum()
    return result


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 1, 7, 64, 1000])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 0.999, 1.0])
def test_probabilities_match_an_independent_computation(temperature, top_k, top_p):
    logits = np.random.default_rng(0).normal(size=(20, 64)).astype(np.float32) * 3
    ours = ar_model.probabilities(torch.from_numpy(logits), temperature, top_k, top_p)
    np.testing.assert_allclose(ours, numpy_probabilities(logits, temperature, top_k, top_p), atol=2e-6)
    assert ours.dtype == torch.float32


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    logits = torch.zeros(1, 4)
    for top_p, kept in ((0.1, 1), (0.25, 1), (0.26, 2), (0.5, 2), (0.51, 3), (1.0, 4)):
        assert ar_model.probabilities(logits, top_p=top_p).count_nonzero() == kept


def test_draws_follow_the_probabilities_and_never_hit_a_zero():
    p = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0])
    noise = torch.from_numpy(np.random.default_rng(0).random(100_000))
    counts = ar_model.draw(p.expand(100_000, 6), noise).bincount(minlength=6) / 100_000
    torch.testing.assert_close(counts, p, atol=0.01, rtol=0)
    assert not counts[p == 0].any()
    extremes = torch.tensor([0.0, np.nextafter(1.0, 0.0)], dtype=torch.float64)
    for total in (1.0, 0.97, 1.03):                                     # also when rounding spoiled the sum
        assert ar_model.draw(total * p.expand(2, 6), extremes).tolist() == [1, 4]
    assert ar_model.draw(torch.eye(6), torch.rand(6, dtype=torch.float64)).tolist() == list(range(6))


def test_samples_follow_the_model_distribution():
    """The first token of 4,000 images against the probabilities of the full pass, all settings included."""
    config = small_config(bits=(2, 2), grid=(1, 2))
    model, B = build(config), 4000
    settings = {"cfg_scale": (2.0, 1.5), "temperature": (0.7, 1.3), "top_k": (3, 0), "top_p": (1.0, 0.9)}
    labels = torch.full((B,), 3)
    drawn = sample(model, labels, noise_of(model, B), sampling_settings(2, **settings))
    first, second = (ids[:, 0] for ids in drawn)
    tokens = [torch.zeros(1, 2, dtype=torch.int64) for _ in range(2)]
    for a in range(4):
        tokens[0][0, 0] = a
        with torch.no_grad():                                           # rows: class 3, and 4 for no class
            logits = model([ids.expand(2, 2) for ids in tokens], torch.tensor([3, 4]))
        p = ar_model.probabilities(ar_model.guide(logits[0][:, 0], 2.0), 0.7, 3)[0, a]
        q = ar_model.probabilities(ar_model.guide(logits[1][:, 0], 1.5), 1.3, 0, 0.9)[0]
        joint = second[first == a].bincount(minlength=4) / B
        torch.testing.assert_close(joint, p * q, atol=0.025, rtol=0)


@pytest.mark.parametrize("name, values", [
    ("cfg_scale", ((1, 2, 3), -1.0, math.nan)), ("temperature", ((1.0, -0.1), math.inf)),
    ("top_k", (-1, 2.5, (1, 2, 3))), ("top_p", (0.0, (0.5, 1.1), math.nan))])
def test_impossible_settings_are_clear_errors(name, values):
    for value in values:
        refused("--" + name.replace("_", "-"), sampling_settings, 2, **{name: value}, kind=ValueError)


def test_settings_spread_over_the_sub_tokens():
    settings = sampling_settings(2, cfg_scale=(1.9, 2.0), temperature=[0.5], top_k=600, top_p=0.9)
    assert settings == [ar_model.Settings(1.9, 0.5, 600, 0.9), ar_model.Settings(2.0, 0.5, 600, 0.9)]
    for published in ar_model.SAMPLING.values():
        assert len(sampling_settings(2, **published)) == 2
