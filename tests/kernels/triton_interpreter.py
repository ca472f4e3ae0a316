"""A process of its own whose Triton kernels run in the interpreter.

Triton decides between compiling and interpreting when it is imported, so one process cannot do
both. Run as a script, this serves calls from stdin; `Interpreter` is the other end.
"""

import importlib
import io
import os
import subprocess
import sys

import torch


def _send(stream, message):
    buffer = io.BytesIO()
    torch.save(message, buffer)
    data = buffer.getvalue()
    stream.write(len(data).to_bytes(8, "little") + data)
    stream.flush()


def _receive(stream):
    size = stream.read(8)
    if len(size) < 8:
        raise EOFError
    data = stream.read(int.from_bytes(size, "little"))
    return torch.load(io.BytesIO(data), weights_only=False)


class Interpreter:
    """Calls functions by name, "module:function", in the other process."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        )

    def call(self, function, *args, settings=None, **kwargs):
        """settings: {"module:name": value}, for this call only.

        Raises what the function raised there, if it is a ValueError, else RuntimeError.
        """
        _send(self._process.stdin, (function, args, kwargs, settings or {}))
        kind, result = _receive(self._process.stdout)
        if kind == "ValueError":
            raise ValueError(result)
        if kind != "result":
            raise RuntimeError(f"{kind}: {result}")
        return result

    def close(self):
        self._process.stdin.close()
        self._process.wait(timeout=30)


def poison_new_tensors(monkeypatch_setattr):
    """Memory that nobody wrote shows: NaN in floating point, 101 in integers."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        make = getattr(owner, name)

        def poisoned(*args, make=make, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else 101)

        monkeypatch_setattr(owner, name, poisoned)


def round_to_fp8_as_gpus_do():
    """The interpreter drops the carry when rounding to fp8 overflows the mantissa."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def converted(values, source, target, rounding):
        if (source, target) != (tl.float32, tl.float8e4nv):
            return convert(values, source, target, rounding)
        return torch.tensor(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    interpreter._convert_float = converted


def masks_are_bool():
    """Triton 3.9 spreads one comparison over a block as integers, and takes no such mask."""
    from triton.runtime import interpreter

    builder = type(interpreter.interpreter_builder)
    load = builder.create_masked_load

    def with_bool(self, pointers, mask, *others):
        mask = interpreter.TensorHandle(mask.data.astype(bool), mask.dtype)
        return load(self, pointers, mask, *others)

    builder.create_masked_load = with_bool


def _find(name):
    module, attribute = name.split(":")
    return importlib.import_module(module), attribute


def _answer(function, args, kwargs, settings):
    previous = {}
    try:
        for name, value in settings.items():
            previous[name] = getattr(*_find(name))
            setattr(*_find(name), value)
        return "result", getattr(*_find(function))(*args, **kwargs)
    except Exception as error:
        return type(error).__name__, str(error)
    finally:
        for name, value in previous.items():
            setattr(*_find(name), value)


def _serve():
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr
    poison_new_tensors(setattr)
    round_to_fp8_as_gpus_do()
    masks_are_bool()
    while True:
        try:
            request = _receive(requests)
        except EOFError:
            return
        _send(answers, _answer(*request))


if __name__ == "__main__":
    _serve()
