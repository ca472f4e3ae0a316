"""The stopwatch runs on the stream that the call runs on."""

import time

import torch
from sparse_video_attention.patching.timing import Stopwatch


class Event:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self, stream):
        self.stream = stream

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        assert self.stream == end.stream
        return 1500.0


def test_marks_lie_on_the_stream_of_the_calls_device(monkeypatch):
    asked = []

    def current_stream(device):
        asked.append(device)
        return f"stream of {device}"

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    device = torch.device("cuda", 1)
    watch = Stopwatch(device)
    watch.stop()
    assert watch.seconds() == 1.5
    assert asked == [device, device]


def test_host_time_where_there_are_no_events():
    watch = Stopwatch(torch.device("cpu"))
    time.sleep(0.01)
    watch.stop()
    assert 0.01 <= watch.seconds() < 10
