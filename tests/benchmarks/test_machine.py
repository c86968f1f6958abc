"""How calls on a GPU are timed, on a simulated one."""

from __future__ import annotations

import contextlib

import pytest
import torch
from fastmtl.benchmarks import machine

CUDA = torch.device("cuda", 0)
HERTZ = 1.98e9


class Device:
    """A GPU with one stream: a clock of the host, and when the stream is done with what it was asked for.

    Attributes:
        host: Seconds of the host's clock.
        done: When the stream will be idle.
        dirty: Bytes of written lines in the cache.
    """

    def __init__(self) -> None:
        self.host = self.done = 0.0
        self.dirty = 0

    def launch(self, seconds: float, *, host: float = 5e-6) -> None:
        """Ask for work."""
        self.host += host
        self.done = max(self.done, self.host) + seconds

    def kernel(self, bytes_read: int, host: float = 5e-6) -> None:
        """Read memory at 4 TB/s, after what the cache has to write back for it."""
        self.launch((bytes_read + min(self.dirty, bytes_read)) / 4e12, host=host)
        self.dirty -= min(self.dirty, bytes_read)

    def wait(self) -> None:
        """Let the host wait for the stream."""
        self.host = max(self.host, self.done)


class Event:
    """A point of the stream."""

    device: Device

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.time = float("nan")

    def record(self) -> None:
        self.device.launch(0, host=1e-6)
        self.time = self.device.done

    def query(self) -> bool:
        return self.device.host >= self.time

    def synchronize(self) -> None:
        self.device.host = max(self.device.host, self.time)

    def elapsed_time(self, end: Event) -> float:
        return (end.time - self.time) * 1e3


class Swept:
    """A buffer larger than the cache of 50 MB."""

    def __init__(self, device: Device) -> None:
        self.device = device

    def sum(self) -> None:
        self.device.kernel(1 << 30)

    def zero_(self) -> None:
        self.device.launch(2**30 / 4e12)
        self.device.dirty = 50 << 20


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    simulated = Device()
    monkeypatch.setattr(Event, "device", simulated, raising=False)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: simulated.launch(cycles / HERTZ), raising=False)
    monkeypatch.setattr(machine, "_swept", lambda _: Swept(simulated))
    return simulated


def test_a_cold_call_pays_for_its_own_bytes(device: Device) -> None:
    size = 48 << 20
    assert machine.cold_seconds(lambda: device.kernel(size), CUDA) == pytest.approx(size / 4e12)


@pytest.mark.parametrize("launches", [1, 40, 2480])
def test_the_host_does_not_count(device: Device, launches: int) -> None:
    def call() -> None:
        for _ in range(launches):
            device.kernel(4 << 10)

    assert machine.cold_seconds(call, CUDA) == pytest.approx(launches * (4 << 10) / 4e12)


def test_a_long_hold_for_a_slow_host(device: Device) -> None:
    assert machine.cold_seconds(lambda: device.kernel(4 << 20, host=3e-3), CUDA) == pytest.approx((4 << 20) / 4e12)


def test_a_call_that_waits_ends_and_counts_its_waits(device: Device) -> None:
    def call() -> None:
        device.kernel(4 << 20)
        device.wait()
        device.kernel(4 << 20, host=20e-6)

    assert 20e-6 < machine.cold_seconds(call, CUDA) < 40e-6
