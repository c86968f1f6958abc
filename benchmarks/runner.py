"""Runs benchmarks: checks every variant, times those that pass in alternating order, writes rows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from fastmtl.benchmarks.machine import Probes, cold_seconds, facts, plain_pass, probes, wait_for
from fastmtl.benchmarks.registry import BENCHES, Case, cases_of
from fastmtl.benchmarks.tables import plot_kernels, write_rows

from fastmtl.support.memory import keep_freed_memory
from fastmtl.support.names import resolve_name
from fastmtl.trainer.setup.checks import find_device

__all__ = ["run_kernels", "spread", "time_in_turn"]

Row = dict[str, Any]

_SHORTEST_SAMPLE = 1e-3


@runtime_checkable
class _SelfTimed(Protocol):
    """A call that times itself."""

    def __call__(self) -> Any:
        """Make it."""

    def seconds(self, repeats: int) -> float:
        """Return seconds per call."""


def _sample(call: Callable[[], Any] | _SelfTimed, repeats: int, device: torch.device, cold: bool = False) -> float:
    """Return seconds per call; of a GPU's work alone, with nothing in its cache, if ``cold``."""
    if isinstance(call, _SelfTimed):
        return call.seconds(repeats)
    if cold and device.type == "cuda":
        return statistics.fmean(cold_seconds(call, device) for _ in range(repeats))
    wait_for(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    wait_for(device)
    return (time.perf_counter() - start) / repeats


@dataclass(slots=True)
class _Timing:
    """Seconds per call of every variant, what the machine does per second, and seconds of a plain pass, by rounds."""

    samples: dict[str, list[float]]
    read: list[list[float]]
    copy: list[list[float]]
    multiply_adds: list[float]
    plain: list[float]

    def floor(self, case: Case) -> list[float]:
        """Return the seconds memory needs: no faster than it reads, nor than it moves bytes in both directions."""
        seconds = [case.bytes_read / rate for rate in max(self.read, key=statistics.median)]
        if case.bytes_written:
            moved = case.bytes_read + case.bytes_written
            rates = max(self.copy, key=statistics.median)
            seconds = [max(one, moved / rate) for one, rate in zip(seconds, rates, strict=True)]
        return seconds


def time_in_turn(
    calls: Mapping[str, Callable[[], Any] | _SelfTimed],
    device: torch.device,
    seconds: float,
    every_round: Callable[[], None] = lambda: None,
    cold: bool = False,
) -> dict[str, list[float]]:
    """Return samples, in seconds per call, of all calls taken in turn, in an order that alternates from round to round.

    Args:
        calls: What to time; one with a method ``seconds(repeats)`` says itself how many seconds a call takes.
        device: Where it runs.
        seconds: How long to go on; five rounds at least.
        every_round: Called before each round.
        cold: On a GPU, sweep its cache before each call and time its work alone. Without it a call on a GPU takes as
            long as the host or the device, whichever is slower.
    """
    for call in calls.values():
        call()  # The first call may load or compile kernels.
    repeats = {name: max(1, round(_SHORTEST_SAMPLE / _sample(call, 1, device, cold))) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    end = time.perf_counter() + seconds
    while order and (time.perf_counter() < end or len(samples[order[0]]) < 5):
        every_round()
        for name in order:
            samples[name].append(_sample(calls[name], repeats[name], device, cold))
        order.reverse()
    return samples


def spread(samples: Sequence[float], unit: Literal["ms", "us"]) -> Row:
    """Return the 20, 50 and 80 % quantiles of samples in seconds, in milliseconds or microseconds."""
    deciles = statistics.quantiles(samples, n=10)
    scale = {"ms": 1e3, "us": 1e6}[unit]
    return {f"{name}_{unit}": deciles[at] * scale for name, at in (("p20", 1), ("median", 4), ("p80", 7))}


def _time(case: Case, calls: dict[str, Callable[[], Any]], device: torch.device, seconds: float) -> _Timing:
    """Time all calls and the machine in turn."""
    probe = probes(device) if case.bytes_read else Probes((), ())
    copies = probe.copy if case.bytes_written else ()
    timing = _Timing({}, [[] for _ in probe.read], [[] for _ in copies], [], [])
    plain = plain_pass(case.reads, case.writes)

    def measure_machine() -> None:
        for rates, measure in zip(timing.copy, copies, strict=True):
            rates.append(measure())
        # Between two sweeps of the caches, which it is to find as cold as the calls do.
        if plain is not None:
            timing.plain.append(plain())
        for rates, measure in zip(timing.read, probe.read, strict=True):
            rates.append(measure())
        if case.multiply_adds and probe.multiply_adds is not None:
            timing.multiply_adds.append(probe.multiply_adds())

    timing.samples = time_in_turn(calls, device, seconds, measure_machine, cold=case.bytes_read > 0)
    return timing


def _rows_of(op: str, case: Case, device: torch.device, seconds: float) -> list[Row]:
    errors = {name: case.error(variant.call()) for name, variant in case.variants.items()}
    green = {name: v.call for name, v in case.variants.items() if errors[name] <= v.allowed}
    timing = _time(case, green, device, seconds) if green else _Timing({}, [], [], [], [])
    rows = []
    for name, variant in case.variants.items():
        row: Row = {
            "op": op,
            "case": case.name,
            "dtype": case.dtype,
            "variant": name,
            "error": errors[name],
            "allowed_error": variant.allowed,
        }
        if name in timing.samples:
            row |= spread(timing.samples[name], "us")
            if case.bytes_read:
                moved = case.bytes_read + case.bytes_written
                floor = timing.floor(case)
                ratios = [least / taken for least, taken in zip(floor, timing.samples[name], strict=True)]
                row |= {"bytes": moved, "bytes_per_s": moved / statistics.median(timing.samples[name])}
                row |= {"bound_bytes_per_s": moved / statistics.median(floor)}
                row |= {"share_of_bound": statistics.median(ratios)}
            if timing.plain:
                pairs = zip(timing.plain, timing.samples[name], strict=True)
                row |= {"plain_us": statistics.median(timing.plain) * 1e6}
                row |= {"share_of_plain": statistics.median(one / taken for one, taken in pairs)}
            if timing.multiply_adds:
                done = zip(timing.multiply_adds, timing.samples[name], strict=True)
                row |= {"multiply_adds": case.multiply_adds}
                row |= {"share_of_arithmetic": statistics.median(case.multiply_adds / rate / t for rate, t in done)}
        rows.append(row)
    return rows


def _line(row: Row) -> str:
    head = f"{row['op']:9} {row['case']:16} {row['dtype']:9} {row['variant']:20}"
    if "median_us" not in row:
        return f"{head} WRONG: error {row['error']:.1e}, allowed {row['allowed_error']:.1e}; not timed"
    line = f"{head} {row['median_us']:11.1f} us  ({row['p20_us']:.1f} .. {row['p80_us']:.1f})"
    if "share_of_bound" in row:
        line += f"  {row['bytes_per_s'] / 1e9:6.1f} GB/s, {row['share_of_bound']:4.0%} of the memory's"
    if "share_of_plain" in row:
        line += f", {row['share_of_plain']:4.0%} of a plain pass"
    if "share_of_arithmetic" in row:
        line += f", {row['share_of_arithmetic']:4.0%} of the multiply-adds'"
    return line


def run_kernels(
    ops: Sequence[str] | None = None,
    device: torch.device | str = "cpu",
    csv_path: Path | None = None,
    plot_path: Path | None = None,
    quick: bool = False,
) -> list[Row]:
    """Benchmark ops and return one row per op, case and variant; print them as they come.

    A variant whose result is wrong gets no time. ``share_of_bound`` is the least time
    memory needs to read, and to read and write, the bytes of the case over the time taken, both measured in turn;
    ``share_of_plain`` the same of the time that reading these very tensors takes on the CPU, one after the other, and
    writing as many as are written; ``share_of_arithmetic`` of the time float32 multiply-adds need.

    Args:
        ops: Names of ops; all if None.
        device: Where to run.
        csv_path: File to write the rows to.
        plot_path: File for a picture of them.
        quick: Few cases and little time.

    Raises:
        UsageError: An unknown op, or no name of a device.
        BackendError: The device is not there.
    """
    device = find_device(device)
    names = [resolve_name(name, {known: known for known in BENCHES}, "op") for name in ops or BENCHES]
    if device.type == "cpu":
        keep_freed_memory()  # As in training, where results do not lie in pages that the system has to clear first.
    known_facts = facts(device)
    print("  ".join(f"{key} {value}" for key, value in known_facts.items()))
    rows: list[Row] = []
    for op in names:
        for case in cases_of(op, device, quick):
            for row in _rows_of(op, case, device, seconds=0.5 if quick else 1.0 if device.type == "cuda" else 6.0):
                print(_line(row), flush=True)
                rows.append(row | known_facts)
            if csv_path is not None:
                write_rows(rows, csv_path)
    if plot_path is not None:
        plot_kernels(rows, plot_path)
    return rows
