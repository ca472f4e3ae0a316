"""Stand-ins for every version of the dense libraries, each with the call that it has."""

import torch

from .conftest import exact, tokens_first


def flash2(stand_in, calls):
    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1)
    ):
        calls.add(q, k, v, dropout_p=dropout_p, causal=causal, window_size=window_size)
        return tokens_first(q, k, v, softmax_scale)

    stand_in("flash_attn", flash_attn_func=flash_attn_func)


def flash3(module, returns_lse):
    """FlashAttention 3 and 4: one call, some versions of which return (out, log-sum-exp)."""

    def install(stand_in, calls):
        def flash_attn_func(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1)):
            calls.add(q, k, v, causal=causal, window_size=window_size)
            out = tokens_first(q, k, v, softmax_scale)
            return (out, torch.zeros(1)) if returns_lse else out

        stand_in(module, flash_attn_func=flash_attn_func)

    return install


def sage(is_version_2):
    def install(stand_in, calls):
        def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None):
            assert all(x.stride(-1) == 1 for x in (q, k, v)) and not is_causal
            calls.add(q, k, v, tensor_layout=tensor_layout)
            if not is_version_2:
                k -= k.mean(dim=1 if tensor_layout == "NHD" else 2, keepdim=True)
            if tensor_layout == "NHD":
                return tokens_first(q, k, v, sm_scale)
            return exact(q, k, v, sm_scale).to(q.dtype)

        extra = {"sageattn_qk_int8_pv_fp16_cuda": None} if is_version_2 else {}
        stand_in("sageattention", sageattn=sageattn, **extra)

    return install


def sage3(stand_in, calls):
    def sageattn3_blackwell(q, k, v, attn_mask=None, is_causal=False, per_block_mean=True):
        calls.add(q, k, v)
        k -= k.mean(dim=-2, keepdim=True)
        return exact(q, k, v).to(q.dtype).contiguous()

    stand_in("sageattn3", sageattn3_blackwell=sageattn3_blackwell)


def xformers(stand_in, calls):
    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None):
        calls.add(query, key, value, attn_bias=attn_bias, p=p)
        return tokens_first(query, key, value, scale)

    stand_in("xformers.ops", memory_efficient_attention=memory_efficient_attention)


def comfy_kitchen(stand_in, calls):
    def int8_attention(q, k, v, *, scale=None, attn_mask=None):
        calls.add(q, k, v, attn_mask=attn_mask)
        return exact(q, k, v, scale, attn_mask).to(q.dtype)

    stand_in("comfy_kitchen", int8_attention=int8_attention)


LIBRARIES = {
    ("flash_attn2", "2.8"): flash2,
    ("flash_attn3", "release"): flash3("flash_attn_interface", returns_lse=False),
    ("flash_attn3", "beta"): flash3("flash_attn_interface", returns_lse=True),
    ("flash_attn3", "packaged"): flash3("flash_attn_3.flash_attn_interface", returns_lse=False),
    ("flash_attn4", "out"): flash3("flash_attn.cute", returns_lse=False),
    ("flash_attn4", "tuple"): flash3("flash_attn.cute", returns_lse=True),
    ("sage_attn2", "1.0.6"): sage(is_version_2=False),
    ("sage_attn2", "2.2"): sage(is_version_2=True),
    ("sage_attn3", "1.0"): sage3,
    ("xformers", "0.0.35"): xformers,
    ("comfy_kitchen_int8", "0.2.40"): comfy_kitchen,
}
