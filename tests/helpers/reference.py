"""A reference NEO in numpy float64, from a checkpoint's tensors by their published names.

An independent implementation of the specification, for the layouts that no golden data covers. It
has the checkpoint's channel order and an explicit mask, and shares no code with the project.
"""

import math

import numpy as np


def logits(tensors, hf_config, layout, token_ids, pixel_values, grid_hw, context_id, start_id):
    """Logits [L, V] of one document; pixel_values [P, 768] row-major, grid_hw [n, 2]."""
    llm, vision = hf_config["llm_config"], hf_config["vision_config"]
    w = {key: value.astype(np.float64) for key, value in tensors.items()}
    prefix = "language_model.model."
    x = w[prefix + "embed_tokens.weight"][token_ids]
    is_image = token_ids == context_id
    if is_image.any():
        x[is_image] = _patch_embed(w, vision, pixel_values, grid_hw)
    positions, mask = _positions(token_ids, grid_hw, context_id, start_id)
    eps = llm["rms_norm_eps"]
    for i in range(llm["num_hidden_layers"]):
        layer = {
            key.removeprefix(f"{prefix}layers.{i}."): value
            for key, value in w.items()
            if key.startswith(f"{prefix}layers.{i}.")
        }
        y = _norm(x, layer["input_layernorm.weight"], eps)
        x = x + _attention(y, layer, llm, layout, positions, mask)
        y = _norm(x, layer["post_attention_layernorm.weight"], eps)
        gate = y @ layer["mlp.gate_proj.weight"].T
        up = y @ layer["mlp.up_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ layer["mlp.down_proj.weight"].T
    x = _norm(x, w[prefix + "norm.weight"], eps)
    head = w.get("language_model.lm_head.weight", w[prefix + "embed_tokens.weight"])
    return x @ head.T


def _attention(y, layer, llm, layout, positions, mask):
    n, k, h = llm["num_attention_heads"], llm["num_key_value_heads"], llm["head_dim"]
    eps = llm["rms_norm_eps"]

    def heads(which, count):
        raw = (y @ layer[f"self_attn.{which}_proj.weight"].T).reshape(len(y), count, -1)
        if layout == "fused":
            t, hw = np.split(raw, 2, axis=-1)
        else:
            t = raw
            hw = (y @ layer[f"self_attn.{which}_proj_hw.weight"].T).reshape(len(y), count, -1)
        t = _norm(t, layer[f"self_attn.{which}_norm.weight"], eps)
        if layout == "expanded":
            parts = [
                _norm(part, layer[f"self_attn.{which}_norm_{axis}.weight"], eps)
                for part, axis in zip(np.split(hw, 2, axis=-1), "hw", strict=True)
            ]
        else:
            parts = np.split(_norm(hw, layer[f"self_attn.{which}_norm_hw.weight"], eps), 2, axis=-1)
        bases = (llm["rope_theta"], llm["rope_theta_hw"], llm["rope_theta_hw"])
        rotated = [
            _rotate_half(part, positions[axis], base)
            for axis, (part, base) in enumerate(zip([t, *parts], bases, strict=True))
        ]
        return np.concatenate(rotated, axis=-1)

    q, key = heads("q", n), np.repeat(heads("k", k), n // k, axis=1)
    value = (y @ layer["self_attn.v_proj.weight"].T).reshape(len(y), k, h)
    scores = np.einsum("tnj,snj->nts", q, key) / math.sqrt(h)
    scores = np.where(mask, scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    out = np.einsum("nts,snh->tnh", p, np.repeat(value, n // k, axis=1))
    return out.reshape(len(y), n * h) @ layer["self_attn.o_proj.weight"].T


def _positions(token_ids, grid_hw, context_id, start_id):
    """Positions [3, L] and mask [L, L], token by token."""
    t, hw, images = -1, [], iter(grid_hw)
    positions, image_of, image, remaining = [], [], -1, []
    for i, token in enumerate(token_ids):
        if token == context_id:
            if token_ids[i - 1] == start_id:
                rows, columns = (int(side) // 2 for side in next(images))
                remaining = [(r, c) for r in range(rows) for c in range(columns)]
                image, t = image + 1, t + 1
            hw = remaining.pop(0)
            image_of.append(image)
        else:
            t, hw = t + 1 + (i > 0 and token_ids[i - 1] == start_id), (0, 0)
            image_of.append(None)
        positions.append((t, *hw))
    length = len(token_ids)
    mask = np.tril(np.ones((length, length), bool))
    for i in range(length):
        for j in range(length):
            mask[i, j] |= image_of[i] is not None and image_of[i] == image_of[j]
    return np.array(positions).T, mask


def _patch_embed(w, vision, pixel_values, grid_hw):
    prefix = "vision_model.embeddings."
    kernel = w[prefix + "patch_embedding.weight"]
    y = pixel_values @ kernel.reshape(len(kernel), -1).T + w[prefix + "patch_embedding.bias"]
    y = 0.5 * y * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
    out, first = [], 0
    for rows, columns in grid_hw:
        image = y[first : first + rows * columns].reshape(rows, columns, -1)
        first += rows * columns
        row, column = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
        by_column, by_row = np.split(image, 2, axis=-1)
        base = vision["rope_theta_vision"]
        image = np.concatenate(
            [_rotate_pairs(by_column, column, base), _rotate_pairs(by_row, row, base)], axis=-1
        )
        for r in range(0, rows, 2):
            for c in range(0, columns, 2):
                block = image[r : r + 2, c : c + 2]
                out.append(
                    np.einsum("yxe,deyx->d", block, w[prefix + "dense_embedding.weight"])
                    + w[prefix + "dense_embedding.bias"]
                )
    return np.array(out)


def _norm(x, scale, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * scale


def _rotate_half(x, position, base):
    width = x.shape[-1]
    angle = np.outer(position, base ** (-np.arange(0, width, 2) / width))[:, None]
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate(
        [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=-1
    )


def _rotate_pairs(x, position, base):
    width = x.shape[-1]
    angle = position[..., None] * base ** (-np.arange(0, width, 2) / width)
    even, odd = x[..., 0::2], x[..., 1::2]
    out = np.empty_like(x)
    out[..., 0::2] = even * np.cos(angle) - odd * np.sin(angle)
    out[..., 1::2] = even * np.sin(angle) + odd * np.cos(angle)
    return out
