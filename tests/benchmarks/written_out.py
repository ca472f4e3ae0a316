"""Attention over block levels by its definition, one group of keys after the other."""

import math

import torch


def attention_row(q, keys, values, biases):
    """softmax(q . keys / sqrt(D) + biases) . values for the queries of one block."""
    logits = q @ torch.stack(keys).T / math.sqrt(q.shape[-1]) + torch.tensor(biases).double()
    return logits.softmax(-1) @ torch.stack(values)


def weighted_mean(near, keys, values):
    """What stands for a block to queries near `near`: their mean by its weights, and the key moved
    along it until its logit, with the bias ln c of c tokens, is the block's."""
    scale = near.shape[-1] ** -0.5
    logits = keys @ near * scale
    weights = logits.softmax(0)
    key = weights @ keys
    short = logits.exp().sum().log() - math.log(len(keys)) - key @ near * scale
    return key + short / (near @ near * scale) * near, weights @ values


def attention_over_levels(q, k, v, levels, block_m, block_n, pool_rows=0):
    """Attention of one head, key group by key group: a group of c tokens is their mean, bias ln c.

    q, k, v: fp64 [N, D]; levels: [M, N'] with 0 for skipped blocks; pool_rows: of the plan.
    """
    out = torch.empty_like(q)
    for i in range(levels.shape[0]):
        first = i // pool_rows * pool_rows if pool_rows else 0
        near = q[first * block_m : (first + pool_rows) * block_m].mean(0)
        keys, values, biases = [], [], []
        for j in range(levels.shape[1]):
            level = int(levels[i, j])
            end = min(len(k), (j + 1) * block_n)
            for start in range(j * block_n, end, level) if level else ():
                group = slice(start, min(start + level, end))
                if pool_rows and level == block_n:
                    key, value = weighted_mean(near, k[group], v[group])
                else:
                    key, value = k[group].mean(0), v[group].mean(0)
                keys.append(key)
                values.append(value)
                biases.append(math.log(group.stop - group.start))
        queries = slice(i * block_m, (i + 1) * block_m)
        out[queries] = attention_row(q[queries], keys, values, biases)
    return out
