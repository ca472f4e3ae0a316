"""What the Triton attention kernel reads besides q, k and v, for a group of heads at a time.

Pooled levels, and in 8 bits the quantised queries, keys and values. Allocated once per call and
filled again for every group, so extra memory does not grow with the number of heads. Where one
group has all heads, pooled levels can serve further calls.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import KernelCall
from .triton_launch import architecture, warps
from .triton_pool import pool_kernel
from .triton_quantize import quantize_blocks_kernel, quantize_queries_kernel
from .triton_statistics import statistics_kernel
from .triton_weighted import launch_for, weighted_pool_kernel

# Upper limits of the scratch memory of a call, unless one head needs more: in bytes or, if that is
# more, as a share of the GPU's memory, since most of a GPU idles while a group's last programs
# end; and for plans without pooled levels as a share of q, k, v and the output, of which small
# calls have so little that their groups would not fill a GPU.
SCRATCH_BYTES = 256 * 2**20
GPU_SHARE = 0.01
BINARY_SHARE, BINARY_BYTES = 0.1, 64 * 2**20
MAX_GRID_Y = 65535
# Tokens per partial sum of the mean key.
CHUNK_TOKENS = 1024
FP8_MAX = 448.0
LOG2_E = 1.4426950408889634
# Of values that weights add up with in fp16: 64 weights of 2**8 (triton_launch.FP16_SUMS_KEYS) are
# then at most 2**15. A power of two: values lose nothing by it.
FP16_VALUES_MAX = 2.0


def strides(x: Tensor) -> tuple[int, int, int]:
    """Of batch, head and token; channels are contiguous."""
    return x.stride(0), x.stride(1), x.stride(2)


def warps_per_block(block_n: int, head_dim: int) -> int:
    """For the passes over k and v: a thread reads 16 bytes of every eighth token at a time."""
    return max(1, block_n // 8 * head_dim // 8 // 32)


def scratch_limit(device: torch.device) -> int:
    """Bytes of scratch that a call on this device may have."""
    if device.type != "cuda":
        return SCRATCH_BYTES
    memory = torch.cuda.get_device_properties(device).total_memory
    return max(SCRATCH_BYTES, int(GPU_SHARE * memory))


def _pooled_from(call: KernelCall) -> tuple[object, ...]:
    """What pooled keys and values depend on, but for what is in the memory they are made of."""
    sources = [(x.data_ptr(), x.shape, x.stride(), x.dtype, x.device) for x in (call.k, call.v)]
    return *sources, call.plan.levels, call.plan.block_n, call.precision


class Scratch:
    """Scratch memory of one call.

    `group` heads fit; fill() computes it for so many. Tensors have `group` heads, see
    attention_kernel for what is in them; one that the call does not need has no elements.
    """

    def __init__(self, call: KernelCall, *, fp16_sums: bool = False) -> None:
        """fp16_sums: in int8, values are stored for sums in fp16."""
        plan, k = call.plan, call.k
        self.plan = plan
        self.quantized = call.precision in ("int8", "fp8")
        self.fp8 = call.precision == "fp8"
        self.fp16_sums = fp16_sums and call.precision == "int8"
        heads, head_dim = k.shape[0] * k.shape[1], k.shape[3]
        level_rows = [plan.num_k_blocks * plan.block_n // level for level in plan.levels]
        self.mean_queries = call.mean_queries().contiguous() if plan.pool_rows else None
        weighted = 0 if self.mean_queries is None else self.mean_queries.shape[2]
        # The last level, num_k_blocks rows where means are plain.
        level_rows[-1] *= max(1, weighted)
        self.plain_levels = plan.levels[:-1] if weighted else plan.levels
        self.scale_rows = len(self.plain_levels) + weighted
        level_1 = level_rows[0] if plan.levels[0] == 1 else 0
        self.v_rows = sum(level_rows) - level_1
        self.k_rows = sum(level_rows) if self.quantized else self.v_rows
        stored_rows = level_1 if self.fp8 or self.fp16_sums else 0
        q_rows = plan.q_len if self.quantized else 0

        k_dtype = torch.int8 if self.quantized else k.dtype
        v_dtype = torch.float16 if self.fp16_sums else k.dtype
        stored_dtype = torch.float8_e4m3fn if self.fp8 else v_dtype
        per_head = self.v_rows * v_dtype.itemsize + self.k_rows * k_dtype.itemsize
        per_head += stored_rows * stored_dtype.itemsize
        per_head = max(1, (per_head + q_rows) * head_dim + q_rows * torch.float32.itemsize)
        limit = scratch_limit(k.device)
        if plan.levels == (1,):
            inputs_and_output = 2 * (call.q.numel() + k.numel()) * k.element_size()
            limit = min(limit, max(BINARY_BYTES, int(BINARY_SHARE * inputs_and_output)))
        most = max(1, min(heads, MAX_GRID_Y, limit // per_head))
        # Groups of equal size: a small last one would leave most of a GPU idle.
        self.group = -(-heads // -(-heads // most))

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return k.new_empty(self.group, *shape, dtype=dtype)

        self.q = empty(q_rows, head_dim, dtype=torch.int8)
        self.k = empty(self.k_rows, head_dim, dtype=k_dtype)
        self.v = empty(self.v_rows, head_dim, dtype=v_dtype)
        # Both ways are as large; fp8 is stored by channel.
        self.stored_v = empty(stored_rows, head_dim, dtype=stored_dtype)
        self.q_scale = empty(q_rows)
        self.k_scale = empty(self.scale_rows if self.quantized else 0, plan.num_k_blocks)
        self.v_scale = empty(0)

    @classmethod
    def kept(cls, call: KernelCall) -> Scratch | None:
        """What an earlier call left for this one, full."""
        if call.kept is None or call.kept.made is None or call.plan.pool_rows:
            return None
        source, made = call.kept.made
        return made if isinstance(made, cls) and source == _pooled_from(call) else None

    def keep(self, call: KernelCall) -> None:
        """Leave it for further calls, if it has what is pooled of all heads and nothing else."""
        all_heads = self.group == call.k.shape[0] * call.k.shape[1]
        all_heads &= self.mean_queries is None  # others have other queries
        if call.kept is not None and self.k_rows and all_heads and not self.quantized:
            call.kept.made = _pooled_from(call), self

    def fill(self, call: KernelCall, first: int, count: int) -> None:
        """Compute everything for heads first to first + count, counted over the whole batch."""
        q, k, v, plan = call.q, call.k, call.v, self.plan
        k_mean = k
        if self.quantized:
            k_mean = self._quantize(q, k, v, first, count)
        elif any(level > 1 for level in self.plain_levels):
            pool_kernel[plan.num_k_blocks, count](
                *(k, v, self.k, self.v, *strides(k), *strides(v)),
                *(first, k.shape[1], plan.k_len, self.k_rows),
                LEVELS=sum(self.plain_levels),
                BLOCK_N=plan.block_n,
                HEAD_DIM=k.shape[3],
                **warps(warps_per_block(plan.block_n, k.shape[3])),
            )
        if self.mean_queries is not None:
            self._weigh(call, k_mean, first, count)

    def _weigh(self, call: KernelCall, k_mean: Tensor, first: int, count: int) -> None:
        """The last level, of weighted means."""
        plan, k, v, queries = self.plan, call.k, call.v, self.mean_queries
        assert queries is not None
        number = queries.shape[2]
        own = number * plan.num_k_blocks
        scaled = self.fp8 or self.fp16_sums
        weighted_pool_kernel[plan.num_k_blocks, count](
            *(queries, k, v, k_mean, self.v_scale if scaled else k_mean),
            *(self.k, self.v, self.k_scale if self.quantized else self.v),
            *(*strides(k), *strides(v), first, k.shape[1], plan.k_len, number),
            *(self.k_rows, self.v_rows, self.k_rows - own, self.v_rows - own),
            *(self.scale_rows, len(self.plain_levels), call.scale * LOG2_E),
            BLOCK_N=plan.block_n,
            HEAD_DIM=k.shape[3],
            QUANTIZED=self.quantized,
            SCALED=scaled,
            **launch_for(architecture(k.device), plan.block_n, k.shape[3]),
        )

    def _quantize(self, q: Tensor, k: Tensor, v: Tensor, first: int, count: int) -> Tensor:
        """Everything but weighted means; returns the mean keys, fp32 [count, D]."""
        plan, heads, head_dim = self.plan, k.shape[1], k.shape[3]
        chunks = -(-plan.k_len // CHUNK_TOKENS)
        k_sums = k.new_empty(count, chunks, head_dim, dtype=torch.float32)
        scaled = self.fp8 or self.fp16_sums
        v_largest = k.new_empty(count if scaled else 0, chunks, head_dim, dtype=torch.float32)
        statistics_kernel[chunks, count](
            *(k, v, k_sums, v_largest, *strides(k), *strides(v)),
            *(first, heads, plan.k_len, CHUNK_TOKENS),
            HEAD_DIM=head_dim,
            VALUES=scaled,
            **warps(4),
        )
        k_mean = k_sums.sum(1) / plan.k_len
        if self.fp8:
            self.v_scale = v_largest.amax(1).clamp_(min=1e-30) / FP8_MAX
        elif self.fp16_sums:
            largest = v_largest.amax(1).clamp_(min=1e-30) / FP16_VALUES_MAX
            self.v_scale = largest.log2_().ceil_().exp2_()
        quantize_queries_kernel[-(-plan.q_len // 64), count](
            *(q, self.q, self.q_scale, *strides(q), first, heads, plan.q_len),
            HEAD_DIM=head_dim,
            **warps(4),
        )
        quantize_blocks_kernel[plan.num_k_blocks, count](
            *(k, v, k_mean, self.k, self.v, self.stored_v, self.k_scale, self.v_scale),
            *(*strides(k), *strides(v), first, heads, plan.k_len, self.k_rows, self.v_rows),
            self.scale_rows,
            LEVELS=sum(self.plain_levels),
            BLOCK_N=plan.block_n,
            HEAD_DIM=head_dim,
            FP8=self.fp8,
            FP16_SUMS=self.fp16_sums,
            **warps(warps_per_block(plan.block_n, head_dim)),
        )
        return k_mean
