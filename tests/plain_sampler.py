"""A plain cached sampler, to compare `ar_model.Sampler` with: same model, same greedy tokens, no tricks.

It is what one writes first: key and value caches of the full length for the blocks between tokens and,
allocated anew for every token, for those within one; each step attends over all slots under a mask; every
intra step computes q, k and v; w1 and w3 are two products. Takes an `ARModel` not prepared for sampling.
"""
import torch
import torch.nn.functional as F


def rotary_table(config):
    """Complex table (1 + N, d / 2) of a 2-axis grid; the entry of the class is zero."""
    quarter = config.head_dim // 4
    frequencies = 10000.0 ** (-torch.arange(quarter) / quarter)
    cell = torch.arange(config.tokens)
    angles = torch.cat([(cell // config.grid[1])[:, None] * frequencies,
                        (cell % config.grid[1])[:, None] * frequencies], dim=1)
    return torch.cat([torch.zeros(1, 2 * quarter), torch.polar(torch.ones_like(angles), angles)])


def rms_norm(x, norm):
    """RMSNorm written out."""
    scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)
    return (x.float() * scale).type_as(x) * norm.weight


def turn(x, rotary):
    """Rotate x (R, 1, H, d) by one entry (d / 2,) of the table."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotary).flatten(-2).type_as(x)


def plain_block(block, x, rotary, cache, slot):
    """x (R, 1, D) -> (R, 1, D), through `slot` of cache (2, R, H, slots, d)."""
    keys, values = cache
    qkv = block.attention.wqkv(rms_norm(x, block.attention_norm))
    q, k, v = qkv.unflatten(-1, (3, block.heads, -1)).unbind(2)
    keys[:, :, slot], values[:, :, slot] = turn(k, rotary)[:, 0], v[:, 0]
    mask = (torch.arange(keys.shape[2]) <= slot)[None]
    attended = F.scaled_dot_product_attention(turn(q, rotary).transpose(1, 2), keys, values, attn_mask=mask)
    x = x + block.attention.wo(attended.transpose(1, 2).flatten(2))
    h, ffn = rms_norm(x, block.ffn_norm), block.feed_forward
    return x + ffn.w2(F.silu(ffn.w1(h)) * ffn.w3(h))


@torch.no_grad()
def plain_sample(model, labels, scales, tokens=None):
    """Greedy sub-tokens, a list of M (B, N), guided by `scales` (M values), up to `tokens`."""
    config, rows = model.config, 2 * len(labels)
    rotary, dtype = rotary_table(config), model.class_embedding.weight.dtype

    def new_cache():
        return torch.zeros(2, rows, config.heads, 1 + config.tokens, config.head_dim, dtype=dtype)

    inter_caches, drawn = [new_cache() for _ in model.inter_blocks], []
    x = model.class_embedding(torch.cat([labels, torch.full_like(labels, config.num_classes)]))[:, None]
    for t in range(tokens or config.tokens):
        for block, cache in zip(model.inter_blocks, inter_caches):
            x = plain_block(block, x, rotary[t], cache, t)
        intra_caches, token, embeddings = [new_cache() for _ in model.intra_blocks], [], []
        for m, scale in enumerate(scales):
            for block, cache in zip(model.intra_blocks, intra_caches):
                x = plain_block(block, x, rotary[m], cache, m)
            conditional, unconditional = model.heads[m](rms_norm(x, model.norm))[:, 0].float().chunk(2)
            token.append((unconditional + scale * (conditional - unconditional)).argmax(-1))
            x = model.token_embeddings[m](token[m]).repeat(2, 1)[:, None]
            embeddings.append(x)
        x = sum(embeddings)
        drawn.append(torch.stack(token))                              # (M, B)
    return list(torch.stack(drawn, dim=2).unbind(0))
