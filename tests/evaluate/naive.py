"""What the evaluations are held against: a Llama in plain PyTorch that gathers and rotates anew for every token.

It shares no code with the package, and with transformers only the weights and the modules that treat every token by
itself: embedding, norms, projections, MLP.
"""

import math

import torch
import torch.nn.functional as F

# Tokens at a time, for each of which all keys are gathered.
CHUNK = 32


def rotate(vectors, places, inv_freq):
    """Rotary embedding of [..., head_dim] at places [...]; dimensions of size 1 are broadcast."""
    angles = places.double()[..., None] * inv_freq.double()
    cos, sin = torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()
    first, second = vectors.chunk(2, dim=-1)
    return vectors * cos + torch.cat((-second, first), dim=-1) * sin


def attend(query, tokens, key, value, inv_freq, num_sinks, window):
    """Attention of the queries [n, heads, head_dim] of ``tokens`` [n] over the whole stream's keys and values.

    These are [tokens, kv_heads, head_dim]. For each query they are gathered, sinks and then window, and the keys are
    rotated to their ranks.
    """
    size = num_sinks + window
    ranks = torch.arange(size)
    t = tokens[:, None]
    visible = torch.where((ranks < num_sinks) | (t < size), ranks, t - size + 1 + ranks)
    seen = visible <= t
    visible = visible.minimum(t)
    query = rotate(query, t.clamp(max=size - 1), inv_freq).unflatten(1, (key.shape[1], -1))
    scores = torch.einsum("nkgd,nskd->nkgs", query, rotate(key[visible], ranks[:, None], inv_freq))
    weights = scores.div(math.sqrt(query.shape[-1])).masked_fill(~seen[:, None, None], -math.inf).softmax(dim=-1)
    return torch.einsum("nkgs,nskd->nkgd", weights, value[visible]).flatten(1)


@torch.no_grad()
def losses(model, ids, num_sinks, window, at=None):
    """Loss of ids[t + 1] predicted at t by a Llama in fp64, nats [tokens - 1]; only for the tokens ``at`` if given."""
    config, inv_freq = model.config, model.model.rotary_emb.inv_freq
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    hidden = model.model.embed_tokens(ids)
    tokens = torch.arange(len(ids))
    for layer in model.model.layers:
        own = layer.self_attn

        def project(part, projection, heads, norm=layer.input_layernorm):
            return projection(norm(part)).unflatten(-1, (heads, -1))

        parts = hidden.split(CHUNK)
        key, value = (torch.cat([project(part, p, kv_heads) for part in parts]) for p in (own.k_proj, own.v_proj))
        for t in tokens.split(CHUNK):
            query = project(hidden[t], own.q_proj, heads)
            mixed = hidden[t] + own.o_proj(attend(query, t, key, value, inv_freq, num_sinks, window))
            hidden[t] = mixed + layer.mlp(layer.post_attention_layernorm(mixed))
    at = tokens[:-1] if at is None else at
    logits = model.lm_head(model.model.norm(hidden[at]))
    return F.cross_entropy(logits, ids[at + 1], reduction="none")


@torch.no_grad()
def recomputed_losses(model, ids, size, keep_first, every=1):
    """The same from a forward of transformers over the last ``size`` tokens, for each token by itself.

    Only every so-manieth loss is computed; the others are NaN.
    """
    out = []
    for t in range(len(ids) - 1):
        if t % every:
            out.append(torch.tensor(torch.nan))
            continue
        fed = ids[max(0, t - size + 1) : t + 1].clone()
        if keep_first:
            fed[0] = ids[0]
        logits = model(input_ids=fed[None], use_cache=False).logits[0, -1:]
        out.append(F.cross_entropy(logits, ids[t + 1 : t + 2]))
    return torch.stack(out)
