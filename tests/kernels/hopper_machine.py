"""A model of what one Hopper program runs on: barriers, shared memory, copies, partitions.

Partitions run one at a time and are switched at every barrier and copy, in random order; copies
land at random times. Shared memory starts as NaN. So a wrong phase, a buffer given away too early
or read too soon shows as a deadlock or a wrong number for some seed.
"""

import random
import threading

import torch

CHUNK = 64


class Deadlock(AssertionError):
    """Every partition waits, and no copy is under way."""


class Barrier:
    """An mbarrier: a phase ends when all arrivals and all expected bytes are there."""

    def __init__(self):
        self.count = self.missing = None
        self.bytes = self.phase = 0

    def change(self, arrivals=0, expected=0):
        self.missing -= arrivals
        self.bytes += expected
        assert self.missing >= 0, "an arrival too many in one phase"
        if self.missing == 0 and self.bytes == 0:
            self.missing = self.count
            self.phase += 1


class Barriers(list):
    def index(self, i):
        return self[int(i)]


class Tiles:
    """[n, rows, channels] of swizzled tiles over flat memory: 64 channels of all rows at a time."""

    def __init__(self, memory, shape):
        self.tiles = memory.view(shape[0], shape[2] // CHUNK, shape[1], CHUNK)

    def index(self, i):
        return Tile(self.tiles[int(i)])


class Tile:
    """[channel chunk, row, 64 channels], which reads as [row, channel] or transposed."""

    def __init__(self, chunks, transposed=False):
        self.chunks, self.transposed = chunks, transposed

    def permute(self, order):
        assert order == (1, 0)
        return Tile(self.chunks, not self.transposed)

    def read(self):
        value = torch.cat(list(self.chunks), dim=1)
        return value.T if self.transposed else value

    def store(self, value):
        Program.current.partition.unfenced = True
        for chunk, piece in zip(self.chunks, value.split(CHUNK, dim=1), strict=True):
            chunk.copy_(piece)


class Memory:
    """Buffers [n, 1, 1, rows, 64], one after the other."""

    dtype = torch.float64

    def __init__(self, shape):
        self.flat = torch.full(tuple(shape), float("nan"), dtype=torch.float64).view(-1)
        self.buffers = self.flat.view(shape[0], *shape[-2:])

    def index(self, i):
        assert 0 <= int(i) < len(self.buffers)
        return self.buffers[int(i)]

    def tiles(self, shape):
        return Tiles(self.flat, shape)


class Descriptor:
    """TMA descriptor of x [B, H, N, D]; outside of x there are zeros, and nothing is written."""

    layout, dtype = None, torch.float64

    def __init__(self, x):
        self.x = x

    def box(self, at, rows):
        batch, head, row, channel = (int(i) for i in at)
        assert row >= 0
        return self.x[batch, head, row : row + rows, channel : channel + CHUNK]


class Pointer:
    def __init__(self, data, offset=0):
        self.data, self.offset = data.flatten(), offset

    def at(self, offset):
        return self.data[self.offset + int(offset)]

    def __add__(self, offset):
        many = isinstance(offset, torch.Tensor) and offset.ndim > 0
        return Pointer(self.data, self.offset + (offset if many else int(offset)))


class Partition(threading.Thread):
    def __init__(self, program, function, arguments):
        super().__init__(daemon=True)
        self.program, self.function, self.arguments = program, function, arguments
        self.go = threading.Semaphore(0)
        self.ready = lambda: True
        self.error = None
        self.done = self.unfenced = False
        self.products, self.stores = [], []

    def run(self):
        self.go.acquire()
        try:
            self.function(*self.arguments)
            assert not self.products and not self.stores, "it ended with work under way"
        except BaseException as error:  # reported by the program
            self.error = error
        self.done = True
        self.program.turn.release()

    def pause(self, ready=lambda: True):
        self.ready = ready
        self.program.turn.release()
        self.go.acquire()


class Program:
    """One program of the grid."""

    current: "Program"

    def __init__(self, ids, grid, seed):
        self.ids, self.grid, self.random = ids, grid, random.Random(seed)
        self.turn = threading.Semaphore(0)
        self.copies = []
        self.order = {}
        self.partition = None

    def _next(self, able):
        """Whoever comes first in an order that changes now and then: some run far ahead of others,
        and a copy may be the last thing to happen."""
        if self.random.random() < 0.1:
            self.order.clear()
        choices = able + self.copies
        return min(choices, key=lambda one: self.order.setdefault(one, self.random.random()))

    def run(self, parts, warps, registers):
        partitions = [Partition(self, function, arguments) for function, arguments in parts]
        for partition in partitions:
            partition.start()
        while not all(partition.done for partition in partitions):
            able = [p for p in partitions if not p.done and p.ready()]
            if not able and not self.copies:
                raise Deadlock
            choice = self._next(able)
            if choice in self.copies:
                self.copies.remove(choice)
                choice()
                continue
            self.partition = choice
            choice.go.release()
            self.turn.acquire()
            if choice.error is not None:
                raise choice.error
        assert not self.copies, "it ended with copies under way"
