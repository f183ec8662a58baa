"""What the evaluations are held against: a Llama in plain PyTorch that gathers and rotates anew for every token.

It shares no code with the package, and with transformers only the weights.
"""

import math

import torch
import torch.nn.functional as F


def rotate(vectors, places, inv_freq):
    """Rotary embedding of [heads, tokens, head_dim] at places [tokens]."""
    angles = places.double()[:, None] * inv_freq.double()
    cos, sin = torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()
    first, second = vectors.chunk(2, dim=-1)
    return vectors * cos + torch.cat((-second, first), dim=-1) * sin


def attend(query, key, value, inv_freq, num_sinks, window):
    mixed = []
    for t in range(query.shape[1]):
        visible = torch.tensor([*range(min(num_sinks, t + 1)), *range(max(num_sinks, t - window + 1), t + 1)])
        ranks = torch.arange(len(visible))
        scores = rotate(query[:, t : t + 1], ranks[-1:], inv_freq) @ rotate(key[:, visible], ranks, inv_freq).mT
        mixed.append((scores / math.sqrt(query.shape[-1])).softmax(dim=-1) @ value[:, visible])
    return torch.cat(mixed, dim=1)


@torch.no_grad()
def losses(model, ids, num_sinks, window):
    """Loss of ids[t + 1] predicted at t by a Llama in fp64, nats [tokens - 1]."""
    heads = model.config.num_attention_heads
    hidden = model.model.embed_tokens(ids)
    for layer in model.model.layers:
        normed = layer.input_layernorm(hidden)
        projections = (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
        query, key, value = (p(normed).unflatten(-1, (heads, -1)).transpose(0, 1) for p in projections)
        mixed = attend(query, key, value, model.model.rotary_emb.inv_freq, num_sinks, window)
        hidden = hidden + layer.self_attn.o_proj(mixed.transpose(0, 1).flatten(1))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    logits = model.lm_head(model.model.norm(hidden))
    return F.cross_entropy(logits[:-1], ids[1:], reduction="none")


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
