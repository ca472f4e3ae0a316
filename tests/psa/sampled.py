"""What blocks are scored by, written from the definition: the sample, and the sample in 8 bits."""

import torch


def clamped_sample(x, block, stride):
    """The middle one of every stride tokens, where needed the last there is."""
    places = torch.arange(-(-x.shape[2] // block) * block).view(-1, stride)[:, stride // 2]
    return x.index_select(2, places.clamp(max=x.shape[2] - 1))


def in_8_bits(q, k, block_m, block_n, stride):
    """What block_importance is of in 8 bits: each query, and each block of keys around their mean,
    in steps of a 127th of its largest channel."""
    sampled_q = clamped_sample(q, block_m, stride).float()
    sampled_k = clamped_sample(k, block_n, 4).float() - k[:, :, 2::4].float().mean(2, keepdim=True)
    blocks = sampled_k.unflatten(2, (-1, block_n // 4))
    q_step = sampled_q.abs().amax(3, keepdim=True) / 127
    k_step = blocks.abs().amax((3, 4), keepdim=True) / 127
    blocks = (blocks / k_step + 0.5).floor() * k_step
    return (sampled_q / q_step + 0.5).floor() * q_step, blocks.flatten(2, 3)
