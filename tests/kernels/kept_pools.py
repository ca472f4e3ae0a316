"""Calls that share what is pooled, for the process whose kernels are interpreted."""

from sparse_video_attention.kernels.registry import KeptPools, KernelCall
from sparse_video_attention.kernels.triton_forward import forward
from sparse_video_attention.kernels.triton_scratch import Scratch


def in_one_buffer(keys, values, queries, plans, precision, sharing, moved=()):
    """(outputs, how often scratch was filled) of calls whose keys stand in one place in turn.

    keys, values: what is there at each call; sharing: of each call, a number per KeptPools;
    moved: calls whose keys are put in another place.
    """
    k, v = keys[0].clone(), values[0].clone()
    places = []
    kept = {number: KeptPools() for number in set(sharing)}
    fills, fill = [], Scratch.fill

    def counted(self, *args):
        fills.append(args)
        return fill(self, *args)

    Scratch.fill = counted
    try:
        outputs = []
        for call, (q, plan, number) in enumerate(zip(queries, plans, sharing, strict=True)):
            if call in moved:
                places.append(k)  # its memory is not given to others
                k = k.clone()
            k.copy_(keys[call])
            v.copy_(values[call])
            made = KernelCall(q, k, v, plan, 0.2, precision, kept[number])
            outputs.append(forward(made))
    finally:
        Scratch.fill = fill
    return outputs, len(fills)
