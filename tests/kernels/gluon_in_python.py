"""Runs a Gluon kernel's own source in Python, in fp64, on the model of a Hopper program.

Products read shared memory as late as their wait allows. It knows only what
kernels/hopper_attention.py uses of Gluon.
"""

import importlib.util
import types
from pathlib import Path

import torch
from triton.runtime.jit import JITFunction

_spec = importlib.util.spec_from_file_location(
    "hopper_machine", Path(__file__).with_name("hopper_machine.py")
)
machine = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(machine)
Program = machine.Program


def _pause(ready=lambda: True):
    if Program.current.partition is not None:
        Program.current.partition.pause(ready)


def _wait(barrier, parity):
    _pause(lambda: barrier.phase & 1 != int(parity))


def _init(barrier, count):
    barrier.count = barrier.missing = count


def _arrive(barrier):
    barrier.change(arrivals=1)
    _pause()


def _copy_in(descriptor, at, barrier, buffer):
    def land():
        box = descriptor.box(at, len(buffer))
        buffer.zero_()
        buffer[: len(box)] = box
        # Two bytes per element, whatever the model computes in.
        barrier.change(expected=-2 * buffer.numel())

    Program.current.copies.append(land)
    _pause()


def _copy_out(descriptor, at, buffer):
    partition = Program.current.partition
    assert not partition.unfenced, "stored to shared memory without a fence before the copy"

    def land():
        box = descriptor.box(at, len(buffer))
        box.copy_(buffer[: len(box)])

    partition.stores.append(land)


def _store_wait(pendings):
    assert pendings == 0
    stores = Program.current.partition.stores
    while stores:
        stores.pop()()


def _fence():
    if Program.current.partition is not None:
        Program.current.partition.unfenced = False


class Product:
    def __init__(self, a, b, acc, use_acc):
        self.operands, self.value = (a, b, acc, use_acc), None

    def compute(self):
        a, b, acc, use_acc = self.operands
        product = (a.read() if isinstance(a, machine.Tile) else a) @ b.read()
        self.value = acc + product if use_acc else product


def _mma(a, b, acc, use_acc=True, is_async=False):
    assert is_async
    product = Product(a, b, acc, use_acc)
    Program.current.partition.products.append(product)
    return product


def _mma_wait(num_outstanding, deps):
    _pause()
    products = Program.current.partition.products
    while len(products) > num_outstanding:
        products.pop(0).compute()
    (product,) = deps
    assert product.value is not None, "the product waited for may still be under way"
    return product.value


def _load(pointer, mask=True, other=None):
    if not bool(mask):
        return torch.tensor(other)
    assert 0 <= pointer.offset < len(pointer.data), "a load outside the lists"
    return pointer.data[pointer.offset]


def _store(pointers, values, mask):
    inside = pointers.offset[mask]
    assert bool(((inside >= 0) & (inside < len(pointers.data))).all()), "a store outside"
    pointers.data[inside] = values[mask]


def _allocate(dtype, shape, layout):
    if dtype == torch.int64:
        return machine.Barriers(machine.Barrier() for _ in range(shape[0]))
    return machine.Memory(shape)


def _tensors(function):
    return lambda *values: function(*(torch.as_tensor(value) for value in values))


GL = types.SimpleNamespace(
    int64=torch.int64,
    float32=torch.float64,
    NVMMASharedLayout=lambda *args, **kwargs: None,
    NVMMADistributedLayout=lambda *args: None,
    DotOperandLayout=lambda *args: None,
    SliceLayout=lambda *args: None,
    static_range=range,
    program_id=lambda axis: torch.tensor(Program.current.ids[axis]),
    num_programs=lambda axis: Program.current.grid[axis],
    allocate_shared_memory=_allocate,
    warp_specialize=lambda *args: Program.current.run(*args),
    load=_load,
    store=_store,
    zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
    full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
    arange=lambda start, end, layout: torch.arange(start, end),
    convert_layout=lambda x, layout: x,
    expand_dims=lambda x, axis: x.unsqueeze(axis),
    where=torch.where,
    maximum=_tensors(torch.maximum),
    cdiv=lambda a, b: -(-a // b),
    max=lambda x, axis: x.amax(axis),
    sum=lambda x, axis: x.sum(axis),
    exp2=torch.exp2,
    log2=torch.log2,
)
HOPPER = {
    "gl": GL,
    "mbarrier": types.SimpleNamespace(
        MBarrierLayout=lambda: None,
        init=_init,
        wait=_wait,
        arrive=_arrive,
        expect=lambda barrier, count: barrier.change(arrivals=1, expected=count),
    ),
    "tma": types.SimpleNamespace(store_wait=_store_wait),
    "copy_to_shared": _copy_in,
    "copy_to_global": _copy_out,
    "reinterpret": lambda memory, dtype, shape, layout: memory.tiles(shape),
    "fence_async_shared": _fence,
    "warpgroup_mma": _mma,
    "warpgroup_mma_wait": _mma_wait,
}


def python_functions(module, **replaced):
    """The module's kernels as Python functions over the model, except those replaced."""
    functions = dict(HOPPER)
    for name, value in vars(module).items():
        if isinstance(value, JITFunction):
            functions[name] = types.FunctionType(value.fn.__code__, functions, name)
        elif hasattr(value, "value"):
            functions[name] = value.value
    functions.update(replaced)
    return functions


def run_program(kernel, ids, grid, arguments, *, seed, **constants):
    """Run one program of the grid; arguments as for the kernel, descriptors and pointers modelled.

    Raises:
        Deadlock, AssertionError: the program does not keep the rules.
    """
    Program.current = Program(ids, grid, seed)
    kernel(*arguments, **constants)
