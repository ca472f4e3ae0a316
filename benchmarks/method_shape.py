"""Measures the methods on one shape, row by row, as far as an earlier run did not."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

from .method_call import MethodCall
from .method_list import DIALS, POOLED, Method, methods, of_equal_density
from .method_measure import MethodRow, ShapeRow, ShapeRun, fastest, timed_row
from .result_file import drifted


class Found(NamedTuple):
    """A new row, and that of its shape as it is by now."""

    shape: ShapeRow
    row: MethodRow


class Untimed(NamedTuple):
    """A row without its times, and the call to take them of."""

    row: MethodRow
    call: MethodCall


class ShapeMeasurement:
    """The methods on one shape.

    Args:
        repeats: times each call is timed; 0 for none.
        read_clock: what times are taken with off the GPU, in seconds.
        shape_row, known: of an earlier run.

    Attributes:
        rows: by method, those of the earlier run that still hold and the new ones.
        failed: methods that ended in an error, with its text.
    """

    def __init__(
        self,
        run: ShapeRun,
        repeats: int,
        read_clock: Callable[[], float] = time.perf_counter,
        shape_row: ShapeRow | None = None,
        known: Iterable[MethodRow] = (),
    ) -> None:
        self.run, self.repeats, self.read_clock = run, repeats, read_clock
        self.rows = {row.method: row for row in known}
        self.failed: list[str] = []
        self.shape_row = run.row() if shape_row is None else shape_row

    def _forget_if_drifted(self) -> None:
        """Drop what was measured on a card of another speed."""
        before = self.shape_row
        if before.dense is None or before.dense_ms is None or not self.repeats:
            return
        samples = self.run.times({}, [before.dense], self.repeats, self.read_clock)
        if not samples:
            return
        now = fastest(samples)
        spread = ((before.dense_ms_spread or 0.0) + now.spread) / 2
        if drifted(before.dense_ms, now.ms, self.run.device, spread):
            self.rows.clear()
            self.shape_row = self.run.row()

    def measure(self, precisions: Iterable[str], equal_density: bool) -> Iterator[Found]:
        """New rows. On a GPU each comes as soon as it is measured.

        Elsewhere the calls take turns, so that other load on the machine meets all of them. A
        method in a precision that no kernel offers here is left out.

        Args:
            precisions: "auto", and those to measure beside it.
            equal_density: whether to look for radial and Sparge settings as dense as the presets.
        """
        one_by_one = self.run.device.type == "cuda"
        waiting: list[Untimed] = []
        wanted = list(methods(self.run.shape.model_family, precisions))
        if not all(method.name in self.rows for method in wanted):
            self._forget_if_drifted()
        for method in wanted:
            if method.name in self.rows:
                continue
            if method.policy.dense_reason(self.run.shape.layout) is None:
                waiting += self._without_times(method)
            if one_by_one:
                yield from self._timed(waiting)
                waiting.clear()
        yield from self._timed(waiting)
        waiting.clear()
        if equal_density:
            yield from self._of_equal_density()

    def _without_times(self, method: Method) -> Iterator[Untimed]:
        try:
            row, call = self.run.quality(method)
        except Exception as error:  # one method must not end the run
            self.failed.append(f"{method.name} on {self.run.shape.name}: {error}")
            print(f"  failed: {self.failed[-1]}", flush=True)
            return
        if method.precision not in ("auto", "native") and not row.kernel.endswith(method.precision):
            print(f"  {method.name} is left out: no kernel here has this precision")
            return
        yield Untimed(row, call)

    def _timed(self, waiting: list[Untimed]) -> Iterator[Found]:
        """Rows with times; those of dense attention are taken along the first time."""
        if self.repeats and waiting:
            calls = {row.method: call for row, call in waiting}
            has_dense = self.shape_row.dense_ms is not None
            dense = [] if has_dense else [baseline.name for baseline in self.run.dense]
            samples = self.run.times(calls, dense, self.repeats, self.read_clock)
            if dense:
                ms, spread, name = fastest({name: samples[name] for name in dense})
                self.shape_row = replace(
                    self.shape_row, dense=name, dense_ms=ms, dense_ms_spread=spread
                )
            assert self.shape_row.dense_ms is not None
            for row, _ in waiting:
                found = samples[row.method]
                self.rows[row.method] = timed_row(row, found, self.shape_row.dense_ms)
        else:
            self.rows |= {row.method: row for row, _ in waiting}
        for row, _ in waiting:
            yield Found(self.shape_row, self.rows[row.method])

    def _of_equal_density(self) -> Iterator[Found]:
        done = [row.equal_to for row in self.rows.values()]
        presets = {
            row.method: row.density
            for row in self.rows.values()
            if row.method.startswith("psa ") and row.precision == "auto"
            if POOLED not in row.method
        }
        wanted = {name: found for name, found in presets.items() if done.count(name) < len(DIALS)}
        for method in of_equal_density(wanted, self.run.shape.layout, self.run.inputs):
            row, _ = self.run.quality(method)
            difference = row.density - wanted[str(method.equal_to)]
            self.rows[method.name] = replace(row, density_difference=difference)
            yield Found(self.shape_row, self.rows[method.name])
