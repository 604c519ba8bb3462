"""A plain cached sampler, to compare `ar_model.Sampler` with: same model, same greedy tokens, none of the tricks.

It does what a first correct implementation does: key and value caches of the full length for the blocks between tokens
and, allocated for every token anew, for those within a token; every step attends over all slots under a mask; complex
rotary positions; w1 and w3 one after the other. Uses the parameters of an `ARModel` that was not prepared for sampling.
"""
import torch
import torch.nn.functional as F


def plain_rotary(config):
    """Complex table (1 + N, d / 2) for a 2-axis grid; the class's entry is zero."""
    quarter = config.head_dim // 4
    frequencies = 10000.0 ** (-torch.arange(quarter).float() / quarter)
    rows, columns = torch.arange(config.tokens) // config.grid[1], torch.arange(config.tokens) % config.grid[1]
    angles = torch.cat([rows[:, None] * frequencies, columns[:, None] * frequencies], dim=1)
    return torch.cat([torch.zeros(1, 2 * quarter, dtype=torch.complex64), torch.polar(torch.ones_like(angles), angles)])


def rms_norm(x, norm):
    return (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)).type_as(x) * norm.weight


def plain_block(block, x, rotary, cache, slot):
    """x (R, 1, D) at `slot` of cache (keys, values), each (R, H, slots, d)."""
    R, _, D = x.shape
    keys, values = cache
    q, k, v = block.attention.wqkv(rms_norm(x, block.attention_norm)).view(R, 1, 3, block.heads, -1).unbind(2)

    def turn(z):
        return torch.view_as_real(torch.view_as_complex(z.float().unflatten(-1, (-1, 2))) * rotary).flatten(-2).type_as(z)

    keys[:, :, slot] = turn(k)[:, 0]
    values[:, :, slot] = v[:, 0]
    mask = (torch.arange(keys.shape[2]) <= slot)[None]
    attended = F.scaled_dot_product_attention(turn(q).transpose(1, 2), keys, values, attn_mask=mask)
    x = x + block.attention.wo(attended.transpose(1, 2).reshape(R, 1, D))
    h, ffn = rms_norm(x, block.ffn_norm), block.feed_forward
    return x + ffn.w2(F.silu(ffn.w1(h)) * ffn.w3(h))


@torch.no_grad()
def plain_sample(model, labels, scales):
    """Greedy sub-tokens, a list of M (B, N), with guidance `scales`, one for each sub-token."""
    config, B, dtype = model.config, len(labels), model.class_embedding.weight.dtype
    rotary, R = plain_rotary(config), 2 * B

    def new_cache(length):
        return torch.zeros(2, R, config.heads, length, config.head_dim, dtype=dtype)

    inter_caches = [new_cache(1 + config.tokens) for _ in model.inter_blocks]
    x = model.class_embedding(torch.cat([labels, torch.full_like(labels, config.num_classes)]))[:, None]
    tokens = []
    for t in range(config.tokens):
        for block, cache in zip(model.inter_blocks, inter_caches):
            x = plain_block(block, x, rotary[t], cache, t)
        intra_caches = [new_cache(1 + config.tokens) for _ in model.intra_blocks]
        token, embeddings = [], []
        for m, scale in enumerate(scales):
            for block, cache in zip(model.intra_blocks, intra_caches):
                x = plain_block(block, x, rotary[m], cache, m)
            conditional, unconditional = model.heads[m](rms_norm(x, model.norm))[:, 0].float().chunk(2)
            token.append((unconditional + scale * (conditional - unconditional)).argmax(-1))
            x = model.token_embeddings[m](token[m]).repeat(2, 1)[:, None]
            embeddings.append(x)
        x = sum(embeddings)
        tokens.append(torch.stack(token, 1))
    return list(torch.stack(tokens, 1).unbind(2))
