"""Claims about ar_model.py: parity with the published models, causality, exact sampling, strict loading."""
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.parallel import DistributedDataParallel

import ar_model
import runtime
from ar_model import ARConfig, ARModel, Sampler, sample
from helpers import ROOT, fill_module, golden
from plain_sampler import plain_sample

CHECKPOINTS = ROOT.parent / "shared" / "spec" / "checkpoints.json"
GOLDEN_CONFIG = ARConfig(width=64, heads=2, inter_blocks=2, intra_blocks=2, grid=(4, 4), num_classes=10)

SHAPES = {
    "M = 1": {"bits": (7,)},
    "M = 2": {"bits": (3, 5)},
    "M = 3": {"bits": (3, 2, 4)},
    "M = 4": {"bits": (2, 3, 2, 4)},
    "three axes": {"bits": (3, 5), "grid": (2, 3, 4)},
    "separate heads": {"bits": (3, 5), "separate_heads": True},
    "unconditional": {"bits": (3, 5), "num_classes": 0},
}


def small_config(**changes):
    """A transformer of milliseconds; dropout of activations off."""
    shape = dict(width=48, heads=2, inter_blocks=2, intra_blocks=2, bits=(3, 5), grid=(3, 5), num_classes=4,
                 ffn_multiple=16, token_dropout=0.0, attention_dropout=0.0, ffn_dropout=0.0)
    return ARConfig(**{**shape, **changes})


def build(config):
    """A model with weights that make its predictions depend on everything (fresh heads are zero)."""
    return fill_module(ARModel(config), "", ar_model.published_name)


def random_tokens(config, batch, seed=0):
    """Random sub-tokens, M x (batch, N), and labels (batch,)."""
    generator = torch.Generator().manual_seed(seed)
    size = (batch, config.tokens)
    subtokens = [torch.randint(2 ** bits, size, generator=generator) for bits in config.bits]
    return subtokens, torch.randint(max(1, config.num_classes), (batch,), generator=generator)


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture(params=SHAPES, ids=lambda name: name.replace(" ", ""))
def shape(request):
    return small_config(**SHAPES[request.param])


# ------------------------------------------------------------------------------------------------------------
# Parity
# ------------------------------------------------------------------------------------------------------------

def test_logits_under_teacher_forcing_are_the_golden_ones():
    expected, model = golden("ar_model"), build(GOLDEN_CONFIG)
    with torch.no_grad():
        logits = model([expected["sub_index_6"], expected["sub_index_12"]], expected["label"])
    torch.testing.assert_close(logits[0], expected["logits_6"], atol=1e-5, rtol=0)
    torch.testing.assert_close(logits[1], expected["logits_12"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("greedy", [{"temperature": 0}, {"top_k": 1}])
def test_greedy_sampling_with_guidance_gives_the_golden_tokens(prepared, greedy):
    expected, model = golden("ar_model"), build(GOLDEN_CONFIG)
    if prepared:
        ar_model.prepare_for_sampling(model)
    tokens = sample(model, expected["label"], [0, 1], cfg_scale=(1.7, 1.8), **greedy)
    assert equal(tokens, [expected["greedy_cfg_1p7_1p8_6"], expected["greedy_cfg_1p7_1p8_12"]])


@pytest.mark.parametrize("preset, millions", [("AR-B", 343.57), ("AR-L", 804.36), ("AR-XL", 1486.68)])
def test_presets_have_the_published_number_of_parameters(preset, millions):
    with torch.device("meta"):
        model = ARModel(ar_model.PRESETS[preset])
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions


def published_shapes(width, inter, intra, hidden):
    """{name: shape} of a published AR file, from the rule behind its names."""
    shapes = {"pre_emb.weight": [64, width], "post_emb.weight": [4096, width], "norm.weight": [width],
              "class_emb.embedding_table.weight": [1001, width],
              "head.0.weight": [64, width], "head.1.weight": [4096, width]}
    for stack, count in (("spatial_blocks", inter), ("factorized_blocks", intra)):
        for i in range(count):
            shapes |= {f"{stack}.{i}.{name}.weight": shape for name, shape in (
                ("attention.wqkv", [3 * width, width]), ("attention.wo", [width, width]),
                ("feed_forward.w1", [hidden, width]), ("feed_forward.w3", [hidden, width]),
                ("feed_forward.w2", [width, hidden]), ("attention_norm", [width]), ("ffn_norm", [width]))}
    return {f"transformer.{name}": shape for name, shape in shapes.items()}


@pytest.mark.parametrize("preset, rule", [("AR-B", (1024, 24, 2, 2816)), ("AR-L", (1280, 36, 3, 3584)),
                                          ("AR-XL", (1536, 48, 4, 4096))])
def test_presets_have_the_published_names_and_shapes(preset, rule):
    with torch.device("meta"):
        model = ARModel(ar_model.PRESETS[preset])
    ours = {name: list(t.shape) for name, t in ar_model.PublishedView(model).state_dict().items()}
    assert ours == published_shapes(*rule)
    if CHECKPOINTS.exists():
        listed = json.loads(CHECKPOINTS.read_text())[f"AR_256_{preset[3:]}.ckpt"]["state_dict"]
        assert ours == listed


@pytest.mark.parametrize("preset", ["AR-B", "AR-L", "AR-XL"])
def test_published_shapes_lead_back_to_their_preset(preset):
    with torch.device("meta"):
        state = ar_model.PublishedView(ARModel(ar_model.PRESETS[preset])).state_dict()
    assert ar_model.published_config(state, "file") == ar_model.PRESETS[preset]


# ------------------------------------------------------------------------------------------------------------
# Layers and training
# ------------------------------------------------------------------------------------------------------------

def test_the_class_position_of_the_rotary_table_is_zero_and_the_first_cell_is_not_turned():
    table = ar_model.rope_table((4, 4), 32)[:, 0, 0]
    assert table.shape == (17, 16, 2)
    assert table[0].abs().max() == 0
    assert torch.equal(table[1], torch.tensor([1.0, 0.0]).expand(16, 2))


@pytest.mark.parametrize("grid, head_dim, shares", [((4, 6), 32, (8, 8)), ((2, 3, 5), 32, (5, 5, 6)),
                                                    ((2, 3, 5), 24, (4, 4, 4))])
def test_each_axis_turns_its_own_share_of_the_channel_pairs(grid, head_dim, shares):
    table = ar_model.rope_table(grid, head_dim)[1:, 0, 0]
    for n, cell in enumerate(np.ndindex(*grid)):
        angles = np.concatenate([x * 10000.0 ** (-np.arange(p) / p) for x, p in zip(cell, shares)])
        np.testing.assert_allclose(table[n], np.stack([np.cos(angles), np.sin(angles)], -1), atol=1e-6)


def test_the_real_and_the_complex_form_of_rotation_agree():
    x, rope = torch.randn(2, 15, 2, 2, 24), ar_model.rope_table((3, 5), 24)[1:]
    compiled = torch.compile(ar_model.rotate, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, rope), ar_model.rotate(x, rope), atol=1e-6, rtol=0)


@pytest.mark.parametrize("m", [0, 1, 2, 4])
def test_attention_within_a_token_is_causal_attention_with_a_context_of_zero_query_and_key(m):
    q, k, v = torch.randn(3, 6, 2, m + 1, 8).unbind(0)                 # (B, H, m + 1, d)
    q[:, :, 0] = k[:, :, 0] = 0
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, :, m]
    got = ar_model.attend_within_token(q[:, :, m], k.unbind(2)[1:], v.unbind(2))
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


def test_norms_are_computed_in_float32():
    norm, x = ar_model.RMSNorm(64), torch.randn(5, 64) * 300           # the squares overflow float16
    assert norm(x.half()).isfinite().all()
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(norm(x), expected, atol=1e-6, rtol=1e-5)


def test_changing_a_sub_token_changes_nothing_before_it_and_something_after(shape):
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


def test_the_loss_starts_at_the_bits_of_a_token(shape):
    subtokens, labels = random_tokens(shape, 3)
    total, terms = ARModel(shape)(subtokens, labels, return_loss=True)
    torch.testing.assert_close(terms, math.log(2) * torch.tensor(shape.bits, dtype=torch.float32))
    torch.testing.assert_close(total, terms.sum())


def test_the_loss_is_the_mean_negative_log_probability_of_the_tokens(shape):
    model, (subtokens, labels) = build(shape), random_tokens(shape, 3)
    logits = model(subtokens, labels)
    total, terms = model(subtokens, labels, return_loss=True)
    for z, ids, term in zip(logits, subtokens, terms):
        expected = -z.double().log_softmax(-1).gather(-1, ids[..., None]).mean()
        assert abs(term - expected) < 1e-5
    assert total.requires_grad and not terms.requires_grad


def test_every_parameter_gets_a_gradient_through_ddp(shape):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model, (subtokens, labels) = ARModel(shape).train(), random_tokens(shape, 3)
        total, _ = DistributedDataParallel(model)(subtokens, labels, return_loss=True)
        total.backward()
    finally:
        dist.destroy_process_group()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_dropped_labels_are_the_no_class_entry_in_training_only():
    config = small_config(label_dropout=1.0)
    model, (subtokens, labels) = build(config), random_tokens(config, 2)
    with torch.no_grad():
        with_class = model(subtokens, labels)
        without = model(subtokens, torch.full_like(labels, config.num_classes))
        dropped = model.train()(subtokens, labels)
    assert equal(dropped, without) and not equal(dropped, with_class)


@pytest.mark.parametrize("dropout", ["token_dropout", "attention_dropout", "ffn_dropout"])
def test_each_dropout_acts_in_training_and_follows_the_global_seed(dropout):
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


def test_the_model_learns_a_batch_by_heart():
    torch.manual_seed(0)
    config = small_config(label_dropout=0.0)
    model, (subtokens, _), labels = ARModel(config).train(), random_tokens(config, 4), torch.arange(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        total, _ = model(subtokens, labels, return_loss=True)
        total.backward()
        optimizer.step()
    assert total < 0.3 < 8 * math.log(2)
    assert equal(sample(model, labels, range(4), temperature=0), subtokens)


def test_impossible_shapes_are_user_errors():
    for changes, word in (({"heads": 5}, "width"), ({"heads": 0}, "heads"), ({"bits": ()}, "bits"),
                          ({"bits": (6, 0)}, "bits"), ({"grid": (0, 4)}, "grid"), ({"ffn_dropout": 2}, "ffn"),
                          ({"intra_blocks": 0}, "intra_blocks"), ({"num_classes": -1}, "num_classes"),
                          ({"bits": (1, 1, 1), "grid": (1, 1)}, "sub-tokens")):
        with pytest.raises(runtime.UserError, match=word):
            small_config(**changes)


# ------------------------------------------------------------------------------------------------------------
# Sampling
# ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("masked", [False, True])
def test_cached_steps_give_the_logits_of_the_full_pass(shape, masked):
    model, (subtokens, labels) = build(shape), random_tokens(shape, 3)
    with torch.no_grad():
        expected = model(subtokens, labels)
        cache, x = ar_model.allocate_cache(model, 3), ar_model.prefill(model, labels, guided=False)
        for t in range(shape.tokens):
            length = shape.tokens if masked else t + 1
            context = h = model.inter_step(x, cache, torch.tensor([t]), length, masked)
            history, embeddings = None, []
            for m, ids in enumerate(subtokens):
                logits, history = model.intra_step(m, context if shape.separate_heads else h, history)
                torch.testing.assert_close(logits, expected[m][:, t], atol=1e-5, rtol=0)
                h = model.token_embeddings[m](ids[:, t])
                embeddings.append(h)
            x = sum(embeddings)


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_greedy_sampling_is_the_argmax_of_the_guided_full_pass(shape, scale):
    if shape.num_classes == 0 and scale != 1:
        pytest.skip("nothing to guide towards")
    model, (_, labels) = build(shape), random_tokens(shape, 3)
    tokens = sample(model, labels, [0, 1, 2], cfg_scale=scale, temperature=0)
    with torch.no_grad():
        conditional = model(tokens, labels)
        unconditional = model(tokens, torch.full_like(labels, shape.num_classes))
    for c, u, ids in zip(conditional, unconditional, tokens):
        assert torch.equal((u + scale * (c - u)).argmax(-1), ids)


def test_a_plain_cached_sampler_draws_the_same_greedy_tokens():
    config = small_config(width=64, grid=(4, 6))
    model, labels = build(config), torch.tensor([0, 3, 1])
    expected = plain_sample(model, labels, (1.5, 2.5))
    assert equal(sample(model, labels, range(3), cfg_scale=(1.5, 2.5), temperature=0), expected)
    ar_model.prepare_for_sampling(model)
    assert equal(sample(model, labels, range(3), cfg_scale=(1.5, 2.5), temperature=0), expected)


def test_guidance_of_scale_1_is_no_guidance_bit_for_bit():
    config = small_config()
    model, labels = build(config), torch.tensor([0, 3, 1])
    sampler = Sampler(model, 3, cfg_scale=(1, 1.0))
    assert not sampler.guided and sampler.x.shape[0] == 3               # no unconditional rows at all
    assert equal(sampler(labels, range(3)), sample(model, labels, range(3)))
    logits = torch.randn(8, 50) * 10
    assert torch.equal(ar_model.guide(logits, 1.0), logits[:4])         # and where only one scale is 1
    assert torch.equal(ar_model.guide(logits, 0.0), logits[4:])
    torch.testing.assert_close(ar_model.guide(logits, 3.0), logits[4:] + 3 * (logits[:4] - logits[4:]))


def test_top_k_1_is_greedy_also_among_ties():
    logits = torch.randint(0, 3, (200, 40)).float()
    greedy = ar_model.probabilities(logits, temperature=0)
    assert torch.equal(ar_model.probabilities(logits, top_k=1), greedy)
    assert torch.equal(greedy.argmax(-1), logits.argmax(-1)) and torch.equal(greedy.sum(-1), torch.ones(200))
    assert torch.equal(ar_model.probabilities(logits, temperature=1e-30), greedy)


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


def test_noise_of_an_image_depends_on_all_bits_of_its_own_seed_alone():
    noise = ar_model.image_noise([5, 5 + 2 ** 32, (0, 5), (1, 5)], 4, 2)
    assert noise.shape == (4, 2, 4) and noise.dtype == torch.float64 and noise.unique().numel() == 32
    assert 0 <= noise.min() and noise.max() < 1
    assert torch.equal(ar_model.image_noise([(1, 5), 5], 4, 2), noise[:, :, [3, 0]])
    assert torch.equal(ar_model.image_noise(torch.tensor([5]), 4, 2), noise[:, :, :1])


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_an_image_follows_its_seed_wherever_it_stands_in_the_batch(shape, scale):
    if shape.num_classes == 0 and scale != 1:
        pytest.skip("nothing to guide towards")
    model, (_, labels) = build(shape), random_tokens(shape, 4)
    seeds, order = [(7, i) for i in range(4)], [2, 0, 3, 1]
    sampler = Sampler(model, 4, cfg_scale=scale)
    tokens = sampler(labels, seeds)
    assert equal(sampler(labels[order], [seeds[i] for i in order]), [ids[order] for ids in tokens])
    assert equal(sampler(labels, seeds), tokens)                        # nothing is left over from a batch
    assert not equal(sampler(labels, [(8, i) for i in range(4)]), tokens)
    for ids, bits in zip(tokens, shape.bits):
        assert ids.shape == (4, shape.tokens) and ids.dtype == torch.int64
        assert 0 <= ids.min() and ids.max() < 2 ** bits


def test_samples_follow_the_model_distribution():
    """The first token of 4,000 images against the probabilities of the full pass, all settings included."""
    config = small_config(bits=(2, 2), grid=(1, 2))
    model, B = build(config), 4000
    settings = {"cfg_scale": (2.0, 1.5), "temperature": (0.7, 1.3), "top_k": (3, 0), "top_p": (1.0, 0.9)}
    labels = torch.full((B,), 3)
    first, second = (ids[:, 0] for ids in sample(model, labels, range(B), **settings))
    tokens = [torch.zeros(1, 2, dtype=torch.int64) for _ in range(2)]
    for a in range(4):
        tokens[0][0, 0] = a
        with torch.no_grad():                                           # rows: class 3, and 4 for no class
            logits = model([ids.expand(2, 2) for ids in tokens], torch.tensor([3, 4]))
        p = ar_model.probabilities(ar_model.guide(logits[0][:, 0], 2.0), 0.7, 3)[0, a]
        q = ar_model.probabilities(ar_model.guide(logits[1][:, 0], 1.5), 1.3, 0, 0.9)[0]
        joint = second[first == a].bincount(minlength=4) / B
        torch.testing.assert_close(joint, p * q, atol=0.025, rtol=0)


@pytest.mark.parametrize("bucket", [4, 8, 100])
def test_reading_the_cache_in_buckets_gives_the_tokens_of_the_filled_prefix(shape, bucket):
    model, (_, labels) = build(shape), random_tokens(shape, 3)
    expected = sample(model, labels, range(3))
    sampler = Sampler(model, 3, bucket=bucket)
    assert max(sampler.lengths) == shape.tokens and all(n > t for t, n in enumerate(sampler.lengths))
    sampler.cache[0][0].fill_(1e4)                                      # rubbish behind the position
    assert equal(sampler(labels, range(3)), expected)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_step_reads_no_value_back_to_the_host(device):
    """What a CUDA graph needs; fake tensors have no values, so that any .item() or branch on one raises."""
    with FakeTensorMode():
        with torch.device(device):
            model = ARModel(small_config()).eval()
        sampler = Sampler(model, 2, cfg_scale=2.0, temperature=(0.9, 1.0), top_k=(0, 3), top_p=0.9, bucket=4)
        with torch.no_grad():
            sampler.step(8)
        with pytest.raises(DataDependentOutputException):
            sampler.position.item()


def test_compiled_blocks_draw_the_same_tokens_with_one_graph_for_all_layers():
    config = small_config(inter_blocks=3, bits=(2, 3, 4))
    model, labels = build(config), torch.tensor([0, 3])
    expected = sample(model, labels, range(2), cfg_scale=2.0)
    torch._dynamo.reset()
    graphs = []
    ar_model.compile_blocks(model, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    assert equal(sample(model, labels, range(2), cfg_scale=2.0, bucket=4), expected)
    assert len(graphs) == 2 + 3                                         # store, finish, a step a sub-token
    with pytest.raises(runtime.UserError, match="--compile"):
        Sampler(model, 2, compile=True)                                 # graphs of the whole step need a GPU


def test_sampling_allocates_its_cache_once_and_of_exact_length():
    config = small_config()
    model = build(config)
    sampler = Sampler(model, 2, cfg_scale=2.0)
    pointers = [t.data_ptr() for pair in sampler.cache for t in pair]
    sampler(torch.tensor([0, 1]), [0, 1])
    assert [t.data_ptr() for pair in sampler.cache for t in pair] == pointers
    assert len(sampler.cache) == config.inter_blocks
    for keys, values in sampler.cache:                                  # class + all tokens but the last
        assert keys.shape == values.shape == (4, config.heads, config.tokens, config.head_dim)
        assert not keys[:, :, 0].any() and keys[:, :, 1:].any(dim=-1).all() and values.any(dim=-1).all()


def test_sampling_ignores_dropout_and_autocast_and_restores_the_mode():
    config = small_config(token_dropout=0.5, attention_dropout=0.5, ffn_dropout=0.5, label_dropout=1.0)
    model, labels = build(config), torch.tensor([0, 3])
    expected = sample(model, labels, range(2), cfg_scale=2.0)
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert equal(sample(model, labels, range(2), cfg_scale=2.0), expected)
    assert model.training and model.inter_blocks[0].training


def test_preparing_for_bfloat16_keeps_rotary_table_and_logits_in_float32():
    config = small_config(width=64, bits=(6, 8))
    model, labels = build(config), torch.tensor([0, 3])
    subtokens, _ = random_tokens(config, 2)
    with torch.no_grad():
        expected = model(subtokens, labels)
        ar_model.prepare_for_sampling(model, torch.bfloat16)
        logits = model(subtokens, labels)
    assert model.rope.dtype == torch.float32
    assert model.inter_blocks[0].attention.wo.weight.dtype == torch.bfloat16
    for ours, theirs in zip(logits, expected):
        assert ours.dtype == torch.float32
        assert (ours - theirs).abs().mean() < 0.05 * theirs.abs().mean()
        assert ours.unique().numel() > 0.9 * theirs.unique().numel()    # bfloat16 logits would tie often
    assert sample(model, labels, range(2), cfg_scale=2.0)[0].shape == (2, config.tokens)


def test_preparing_keeps_all_weights_and_leaves_layers_as_they_are_where_they_cannot_be_packed(monkeypatch):
    config = small_config()
    model, labels = build(config), torch.tensor([0, 3])
    expected = sample(model, labels, range(2), temperature=0)
    size = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in ar_model.prepare_for_sampling(model).parameters()) == size

    def fail(self, linear):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(ar_model.PackedLinear, "__init__", fail)
    plain = ar_model.prepare_for_sampling(build(config))
    assert isinstance(plain.heads[0], torch.nn.Linear) and plain.inter_blocks[0].feed_forward.w1 is None
    for prepared in (model, plain):
        assert equal(sample(prepared, labels, range(2), temperature=0), expected)


def test_an_unconditional_model_samples_but_cannot_be_guided():
    config = small_config(num_classes=0)
    model = build(config)
    assert model.class_embedding.weight.shape[0] == 1
    assert len(sample(model, torch.zeros(2, dtype=torch.int64), [0, 1])) == 2
    with pytest.raises(runtime.UserError, match="--cfg-scale"):
        Sampler(model, 2, cfg_scale=2.0)


def test_impossible_sampling_settings_are_user_errors():
    model = build(small_config())
    impossible = {"cfg_scale": ((1, 2, 3), -1.0, math.nan), "temperature": ((1.0, -0.1), math.inf),
                  "top_k": (-1, 2.5, (1, 2, 3)), "top_p": (0.0, (0.5, 1.1), math.nan)}
    for name, values in impossible.items():
        for value in values:
            with pytest.raises(runtime.UserError, match="--" + name.replace("_", "-")):
                Sampler(model, 1, **{name: value})
    for label in (-1, 5):
        with pytest.raises(runtime.UserError, match="--classes"):
            sample(model, torch.tensor([label]), [0])
    sample(model, torch.tensor([4]), [0])                               # the number of classes: no class


def test_settings_spread_over_the_sub_tokens():
    settings = ar_model.sampling_settings(2, cfg_scale=(1.9, 2.0), temperature=[0.5], top_k=600, top_p=0.9)
    assert settings == [(1.9, 0.5, 600, 0.9), (2.0, 0.5, 600, 0.9)]
    for published in ar_model.SAMPLING.values():
        assert len(ar_model.sampling_settings(2, **published)) == 2


# ------------------------------------------------------------------------------------------------------------
# Loading
# ------------------------------------------------------------------------------------------------------------

def save_ours(path, saved, **changes):
    """One of our checkpoints, as train_ar.py writes it."""
    torch.save({"format": ar_model.FORMAT, "config": dataclasses.asdict(saved.config), "step": 12,
                "model": saved.state_dict(), "tokenizer": {"sha256": "abc"}, **changes}, path)
    return path


def save_published(path, model, **changes):
    """A Lightning file with the names of a published one; `changes` replaces or (None) removes entries."""
    state = ar_model.PublishedView(model).state_dict()
    state |= {"first_stage_model.encoder.conv_in.weight": torch.zeros(2, 2)}
    state = {name: tensor for name, tensor in {**state, **changes}.items() if tensor is not None}
    torch.save({"state_dict": state, "global_step": 7, "optimizer_states": [{"lr": 0.1}], "epoch": 3}, path)
    return path


def published_model():
    return build(ARConfig(width=128, heads=2, inter_blocks=2, intra_blocks=1, bits=(6, 12), num_classes=10))


def test_our_checkpoints_load_raw_and_ema_weights(tmp_path, shape):
    model = build(shape)
    ema = {name: 0.5 * parameter.detach() for name, parameter in model.named_parameters()}
    path = save_ours(tmp_path / "a.pt", model, ema=ema)
    subtokens, labels = random_tokens(shape, 2)
    for use_ema, weights in ((False, "raw"), (True, "EMA")):
        loaded, info = ar_model.load_ar(path, ema=use_ema)
        expected = ema if use_ema else model.state_dict()
        assert info["weights"] == weights and info["step"] == 12 and info["tokenizer"] == {"sha256": "abc"}
        assert info["preset"] is None and info["source"] == "ours" and len(info["sha256"]) == 64
        assert loaded.config == shape and not loaded.training
        assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    with torch.no_grad():
        assert equal(ar_model.load_ar(path, ema=False)[0](subtokens, labels), model(subtokens, labels))
    assert ar_model.load_ar(save_ours(tmp_path / "b.pt", model))[1]["weights"] == "raw"


def test_the_preset_of_a_checkpoint_is_recognised(tmp_path):
    path = save_ours(tmp_path / "a.pt", ARModel(ar_model.PRESETS["toy"]))
    assert ar_model.load_ar(path)[1]["preset"] == "toy"


def test_published_files_load_and_give_the_same_logits(tmp_path):
    model = published_model()
    loaded, info = ar_model.load_ar(save_published(tmp_path / "AR.ckpt", model))
    assert info["source"] == "published" and info["weights"] == "raw" and info["step"] == 7
    assert info["tokenizer"] is None and dataclasses.replace(loaded.config, ffn_multiple=256) == model.config
    subtokens, labels = random_tokens(model.config, 1)
    with torch.no_grad():
        assert equal(loaded(subtokens, labels), model(subtokens, labels))


@pytest.mark.parametrize("changes, listed", [
    ({"transformer.spatial_blocks.0.attention.wo.weight": None},
     "missing: transformer.spatial_blocks.0.attention.wo.weight"),
    ({"transformer.pre_emb.weight": None}, "missing: transformer.pre_emb.weight"),
    ({"transformer.norm.bias": torch.zeros(128)}, "not expected: transformer.norm.bias"),
    ({"transformer.spatial_blocks.x.weight": torch.zeros(1)}, "not expected: transformer.spatial_blocks.x."),
    ({"norm.weight": torch.zeros(128)}, "not expected: norm.weight"),
    ({"first_stage.weight": torch.zeros(1)}, "not expected: first_stage.weight"),
    ({"transformer.norm.weight": torch.zeros(64)}, r"wrong shapes: transformer.norm.weight is \[64\]"),
])
def test_every_missing_extra_or_misshapen_name_of_a_published_file_is_listed(tmp_path, changes, listed):
    with pytest.raises(runtime.UserError, match=listed):
        ar_model.load_ar(save_published(tmp_path / "AR.ckpt", published_model(), **changes))


def test_files_that_are_no_ar_model_are_user_errors(tmp_path):
    model, path = build(small_config()), tmp_path / "a.pt"
    state = model.state_dict()

    def error():
        with pytest.raises(runtime.UserError) as caught:
            ar_model.load_ar(path)
        return str(caught.value)

    torch.save({"format": "open-magvit2-tokenizer", "model": {}}, path)
    assert "open-magvit2-tokenizer" in error() and str(path) in error()
    torch.save({"state_dict": {"encoder.conv_in.weight": torch.zeros(1)}}, path)
    assert "transformer.pre_emb.weight" in error()
    torch.save({"weights": 1}, path)
    assert "AR model" in error()
    save_ours(path, model, config={**dataclasses.asdict(model.config), "flavour": 1})
    assert "flavour" in error()
    save_ours(path, model, model={name: tensor for name, tensor in state.items() if name != "norm.weight"})
    assert "missing: norm.weight" in error()
    save_ours(path, model, ema={"norm.weight": state["norm.weight"]})
    assert "missing: " in error() and "class_embedding.weight" in error()
    save_ours(path, build(small_config(num_classes=5)), config=dataclasses.asdict(model.config))
    assert "wrong shapes: class_embedding.weight is [6, 48], expected [5, 48]" in error()
    path.write_bytes(path.read_bytes()[:1000])
    assert "cannot be read" in error()
