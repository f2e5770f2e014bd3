"""Recording and replaying, with a stand-in for CUDA that records the work and repeats it on a CPU."""

from contextlib import contextmanager

import pytest
import torch

from grpo.cuda_graphs import Repeat


class Graph:
    """torch.cuda.CUDAGraph without CUDA: what was recorded, and in which memory."""

    made = 0

    def __init__(self):
        Graph.made += 1
        self.memory = self.work = None

    def pool(self):
        return self.memory

    def replay(self):
        self.work()


@pytest.fixture
def device(monkeypatch):
    """-> {"recording": whether one is, "modes": of all recordings, "pools": the memory each was given}."""
    state = {"recording": False, "modes": [], "pools": []}

    @contextmanager
    def recording(graph, pool=None, capture_error_mode="global"):
        state["modes"].append(capture_error_mode)
        state["pools"].append(pool)
        graph.memory = pool or object()
        state["recording"] = True
        yield
        state["recording"] = False
        graph.work = state.pop("work")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(Graph, "made", 0)
    return state


def counted(state):
    """Work that counts how often it ran; while it is recorded it does not run."""
    ran = []

    def work():
        if state["recording"]:
            state["work"] = lambda: ran.append("replayed")
        else:
            ran.append("run")

    return work, ran


def test_each_shape_is_recorded_once_and_replayed(device):
    work, ran = counted(device)
    repeat = Repeat(work, recorded=True)
    for key in (128, 128, 256, 128):
        repeat(16, key)
    assert ran.count("run") == Graph.made == 2 and len(ran) == 4 * 16


def test_recordings_share_their_memory_until_they_are_dropped(device):
    work, _ = counted(device)
    repeat = Repeat(work, recorded=True)
    for key in (128, 256, 384):
        repeat(16, key)
    first, *others = (graph.pool() for graph in repeat.graphs.values())
    assert device["pools"] == [None, first, first] and others == [first, first]
    # memory that no recording holds any more must not be named again
    repeat.forget()
    repeat(16, 128)
    assert device["pools"][-1] is None


def test_a_call_of_another_thread_does_not_end_a_recording(device):
    """NCCL's watchdog calls CUDA all the time."""
    work, _ = counted(device)
    Repeat(work, recorded=True)(2, 128)
    assert device["modes"] == ["thread_local"]


def test_without_recording_nothing_is_made(device):
    work, ran = counted(device)
    Repeat(work, recorded=False)(5, 128)
    assert ran == ["run"] * 5 and not Graph.made
