"""Steps recorded once and replayed, and the grouped hooks: the same code as on a GPU, with a recorder in the graph's place."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from diffusers import DDPMScheduler
from networks import PLAIN, random_unet
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from wanda_fast import calibrate as calibration
from wanda_fast import graphs, ops
from wanda_fast.calibrate import Collector, calibrate, collect_layers
from wanda_fast.graphs import MAX_GRAPHS, WARM_UP, Steps
from wanda_fast.sampling import predict
from wanda_fast.stats import ActivationStats

TINY = {**PLAIN, "sample_size": 8, "block_out_channels": (16, 32, 32), "norm_num_groups": 4}


class Recorder(TorchDispatchMode):
    """What a CUDA graph does: keeps the operations with their memory, not the Python around them, and runs them again."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for argument, value in zip(func._schema.arguments, args, strict=False):
                if isinstance(value, Tensor) and argument.alias_info is not None and argument.alias_info.is_write:
                    self.before.setdefault(id(value), (value, value.clone()))
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(_tensors(out), _tensors(again), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in _tensors(v)] if isinstance(value, tuple | list) else []


def record(run: Callable[[], Any]) -> Callable[[], Any]:
    """A capture: nothing that the recorded step changed stays changed."""
    recorder = Recorder()
    with recorder:
        out = run()
    for t, value in recorder.before.values():
        t.copy_(value)

    def replay() -> Any:
        recorder.replay()
        return out

    return replay


# ----------------------------------------------------------------------------------------------------------------- steps


def test_a_shape_is_recorded_once_and_then_replayed() -> None:
    total, python_runs = torch.zeros(4), []

    def step(x: Tensor, extra: Any, rows: Tensor) -> Tensor:
        python_runs.append(tuple(x.shape))
        total.index_add_(0, rows, x.sum(1) + (0 if extra is None else extra["y"]))
        return x * 2

    steps = Steps(step, record)
    expected = torch.zeros(4)
    for i in range(WARM_UP + 4):
        x, rows = torch.full((2, 3), float(i)), torch.tensor([i % 4, (i + 1) % 4])
        extra = {"y": torch.full((2,), float(i))} if i % 2 == 0 else {"y": torch.ones(2)}
        out = steps(x, extra, rows)
        expected.index_add_(0, rows, x.sum(1) + extra["y"])
        assert torch.equal(out, x * 2)
    assert torch.equal(total, expected)
    assert (steps.eager, steps.replayed) == (WARM_UP, 4) and len(python_runs) == WARM_UP + 1
    assert "4 of 6" in steps.describe()


def test_a_smaller_last_batch_runs_eagerly() -> None:
    steps = Steps(lambda x: x + 1, record)
    for _ in range(WARM_UP + 1):
        steps(torch.zeros(4))
    assert torch.equal(steps(torch.zeros(3)), torch.ones(3))
    assert (steps.eager, steps.replayed) == (WARM_UP + 1, 1)
    assert torch.equal(steps(torch.full((4,), 2.0)), torch.full((4,), 3.0))


def test_the_number_of_recorded_shapes_is_bounded() -> None:
    steps = Steps(lambda x: x + 1, record)
    for size in range(1, MAX_GRAPHS + 3):
        for _ in range(WARM_UP + 2):
            assert torch.equal(steps(torch.zeros(size)), torch.ones(size))
    assert steps.replayed == 2 * MAX_GRAPHS


def test_a_failed_recording_is_said_and_every_step_runs_eagerly(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(run: Callable[[], Any]) -> Callable[[], Any]:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    steps = Steps(lambda x: x + 1, refuse, "calibration steps")
    with caplog.at_level(logging.WARNING, logger="wanda_fast"):
        for _ in range(WARM_UP + 3):
            assert torch.equal(steps(torch.zeros(2)), torch.ones(2))
    assert [r.getMessage() for r in caplog.records] == [
        "calibration steps: no CUDA graph, every step is launched from the host: operation not permitted when stream is capturing"
    ]
    assert (steps.eager, steps.replayed) == (WARM_UP + 3, 0)


def test_where_steps_are_recorded() -> None:
    assert graphs.capture_for(torch.device("cpu"), 1000) is None
    assert graphs.capture_for(torch.device("xpu"), 1000) is None
    assert graphs.capture_for(torch.device("cuda"), graphs.MIN_STEPS - 1) is None
    assert isinstance(graphs.capture_for(torch.device("cuda"), graphs.MIN_STEPS), graphs.CudaCapture)


def test_each_gpu_records_on_a_stream_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's stream for recordings belongs to the GPU of the first one: with it, steps of a second GPU would not be recorded at all."""
    current, used = [0], []

    @contextlib.contextmanager
    def on(device: torch.device) -> Iterator[None]:
        before, current[0] = current[0], device.index
        yield
        current[0] = before

    @contextlib.contextmanager
    def graph(_: Any, *, pool: Any, stream: Any = (0,), capture_error_mode: str) -> Iterator[None]:
        used.append((current[0], stream[0]))
        yield

    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "Stream", lambda index: (index,))
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", MagicMock)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: None)
    graphs._capture_stream.cache_clear()
    for index in (0, 1, 0):
        graphs.CudaCapture(torch.device("cuda", index))(lambda: 3)()
    graphs._capture_stream.cache_clear()
    assert used == [(0, 0), (1, 1), (0, 0)]


# ----------------------------------------------------------------------------------------------------------- calibration


def stats_with(monkeypatch: pytest.MonkeyPatch, *, capture: Any = None, group: int = 0, **arguments: Any) -> ActivationStats:
    """A calibration with this capture and these groups; undoes all patches."""
    monkeypatch.setattr(calibration, "capture_for", lambda device, steps: capture)
    original = Collector.__init__

    def init(self: Collector, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **{"group_elements": group, **kwargs})

    monkeypatch.setattr(Collector, "__init__", init)
    unet, images = random_unet(TINY), torch.randint(0, 256, (5, 8, 8, 3), generator=torch.Generator().manual_seed(0))
    found = calibrate(unet, DDPMScheduler(), images.to(torch.uint8), **{"n": 22, "batch_size": 4, **arguments})
    monkeypatch.undo()
    return found


@pytest.mark.parametrize("rows", ["sample", "bin"])
@pytest.mark.parametrize("mode", ["random", "trajectory"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_replayed_calibration_is_the_eager_one(rows: str, mode: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With five full batches and a smaller one: two eager, three replayed, one eager."""
    settings = {"rows": rows, "mode": mode, "dtype": dtype, "means": True, "trajectory_steps": 8}
    seen: list[Steps] = []
    original = Steps.__init__
    monkeypatch.setattr(Steps, "__init__", lambda self, *a: (seen.append(self), original(self, *a))[1])
    eager = stats_with(monkeypatch, **settings)
    monkeypatch.setattr(Steps, "__init__", lambda self, *a: (seen.append(self), original(self, *a))[1])
    replayed = stats_with(monkeypatch, capture=record, **settings)
    assert seen[0].replayed == 0 and seen[1].replayed > 0
    assert replayed.tables.keys() == eager.tables.keys() and replayed.positions == eager.positions
    for name in eager.tables:
        assert torch.equal(replayed.tables[name], eager.tables[name]), name
        assert torch.equal(replayed.sums[name], eager.sums[name]), name
    assert torch.equal(replayed.timesteps, eager.timesteps) and torch.equal(replayed.counts, eager.counts)


@pytest.mark.parametrize("capture", [None, record], ids=["eager", "replayed"])
@pytest.mark.parametrize("group", [64, 1 << 15], ids=["time-projections", "deep-levels"])
def test_grouped_inputs_give_the_same_tables(group: int, capture: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[tuple[int, ...]] = []
    original = ops.channel_sq_norm

    def counted(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        launches.append(tuple(x.shape))
        return original(x, *args, **kwargs)

    settings: dict[str, Any] = {"n": 16, "means": True}
    monkeypatch.setattr(ops, "channel_sq_norm", counted)
    plain = stats_with(monkeypatch, **settings)
    single = len(launches) // 4
    launches.clear()
    monkeypatch.setattr(ops, "channel_sq_norm", counted)
    grouped = stats_with(monkeypatch, group=group, capture=capture, **settings)
    later = launches[single:]  # after the first pass, which shows what can be grouped
    unet = random_unet(TINY)
    projections = [unet.get_submodule(n).in_features for n in collect_layers(unet) if n.endswith("time_emb_proj")]
    assert len(projections) > 3 and any(len(shape) == 2 and shape[1] >= sum(projections) for shape in later)
    runs = 4 if capture is None else 3  # the first batch again, then every one; the third is recorded, the fourth replayed
    assert len(later) % runs == 0 and len(later) // runs <= single - len(projections) + 1
    for name, table in plain.tables.items():
        torch.testing.assert_close(grouped.tables[name], table, rtol=2e-6, atol=0, msg=lambda m, n=name: f"{n}: {m}")
        assert torch.equal(grouped.sums[name], plain.sums[name])
    shared = grouped.tables["mid_block.attentions.0.to_q"]
    assert shared is grouped.tables["mid_block.attentions.0.to_k"] and shared.is_contiguous()


def test_grouped_halves_equal_the_whole_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"group": 1 << 15, "n": 16, "means": True}
    whole = stats_with(monkeypatch, **settings)
    merged = stats_with(monkeypatch, part=(8, 16), **settings).merge(stats_with(monkeypatch, part=(0, 8), **settings))
    assert all(torch.equal(whole.tables[n], merged.tables[n]) and torch.equal(whole.sums[n], merged.sums[n]) for n in whole.tables)


class Net(nn.Module):
    """b reads the memory of a after a change in place; c to e are alike and small."""

    def __init__(self) -> None:
        super().__init__()
        for name in "abcde":
            setattr(self, name, nn.Linear(3, 3))
        self.order = "cde"
        self.change = False

    def forward(self, x: Tensor) -> None:
        y = x.clone()
        self.a(y)
        y.mul_(2)
        self.b(y)
        for i, name in enumerate(self.order):
            z = x + i
            getattr(self, name)(z)
            if self.change:
                z.add_(1)


def collector_of(net: nn.Module) -> Collector:
    return Collector(dict(net.named_children()), 2, torch.device("cpu"), group_elements=8)  # type: ignore[arg-type]


def test_inputs_changed_in_place_are_not_grouped() -> None:
    net = Net()
    with torch.no_grad(), collector_of(net) as collector:
        for _ in range(3):
            with collector.record(torch.arange(2)):
                net(torch.ones(2, 3))
            if collector.restart():
                continue
    assert set(collector._groups) == set("bcde")
    assert [float(collector.tables()[n][1, 2]) for n in "abcde"] == [2, 8, 2, 8, 18]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"order": "dce"}, "layer d runs where"),
        ({"order": "cd"}, "layer e ran in the first"),
        ({"change": True}, "layer c was changed in place"),
    ],
)
def test_another_course_in_a_later_pass_is_an_error(change: dict[str, Any], message: str) -> None:
    net = Net()
    with torch.no_grad(), collector_of(net) as collector:
        with collector.record(torch.arange(2)):
            net(torch.ones(2, 3))
        vars(net).update(change)
        with pytest.raises(RuntimeError, match=message), collector.record(torch.arange(2)):
            net(torch.ones(2, 3))
        net.order, net.change = "cde", False
        collector.restart()
        with collector.record(torch.arange(2)):  # what was kept of the broken pass is gone
            net(torch.ones(2, 3))
    assert float(collector.tables()["e"][0, 0]) == 9


class NoWaiting(TorchDispatchMode):
    """Fails at operations that would wait for a GPU: numbers, masks and sizes that depend on values, and copies to the CPU."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero", "item")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        assert not any(name == f or name.startswith(f"{f}_") or name.startswith(f"_{f}") for f in self.FORBIDDEN), name
        if func is torch.ops.aten.index.Tensor:
            assert all(i is None or i.dtype != torch.bool for i in args[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("group", [0, 1 << 15])
@pytest.mark.parametrize("config", ["plain", "classes"])
def test_a_step_never_waits_for_the_device(config: str, group: int) -> None:
    if reason := ops.available_backends("cpu")["cpu"]:
        pytest.skip(reason)  # the reference checks rows on the CPU by reading them
    unet = random_unet(config).eval()
    channels = unet.config["in_channels"]
    labels = torch.zeros(2, dtype=torch.int64) if config == "classes" else None
    collector = Collector(collect_layers(unet), 2, torch.device("cpu"), means=True, group_elements=group)
    with torch.no_grad(), collector:
        for _ in range(2):
            with NoWaiting(), collector.record(torch.arange(2)):
                predict(unet, torch.randn(2, channels, 16, 16), torch.tensor([3, 700]), labels, dtype=torch.bfloat16)
    assert len(collector._groups) > 0 if group else not collector._groups


# ----------------------------------------------------------------------------------------------------------- on a GPU


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rows", ["sample", "bin"])
def test_graph_on_the_gpu_agrees_with_eager_and_with_the_cpu(rows: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    torch.use_deterministic_algorithms(False)  # cuBLAS wants an environment variable for it, which the process may lack
    images = torch.randint(0, 256, (5, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def run(device: str, **changes: Any) -> ActivationStats:
        settings: dict[str, Any] = {"n": 37, "batch_size": 4, "rows": rows, "dtype": dtype, "means": True, "device": device}
        return calibrate(random_unet(TINY).to(device), DDPMScheduler(), images, **settings | changes)

    with caplog.at_level(logging.INFO, logger="wanda_fast"):
        graph = run("cuda")
    assert "7 of 10 replayed" in caplog.text and "no CUDA graph" not in caplog.text
    eager, cpu = run("cuda", graph=False), run("cpu")
    assert torch.equal(graph.timesteps, eager.timesteps) and torch.equal(graph.counts, eager.counts)
    tolerance = 1e-3 if dtype == torch.float32 else 0.1  # TF32 and bfloat16 round inside the network
    for name in cpu.tables:
        torch.testing.assert_close(graph.tables[name], eager.tables[name], rtol=1e-3, atol=1e-5)
        error = (graph.tables[name] - cpu.tables[name]).norm() / cpu.tables[name].norm().clamp_min(1e-6)
        assert error < tolerance, (name, float(error))


@pytest.mark.gpu
@needs_gpu
def test_replayed_and_eager_steps_do_not_wait_on_the_gpu() -> None:
    torch.use_deterministic_algorithms(False)
    device = torch.device("cuda", torch.cuda.current_device())
    unet = random_unet(TINY).to(device).eval()
    collector = Collector(collect_layers(unet), 4, device)

    def step(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        with collector.record(rows):
            return predict(unet, x, t)

    steps = Steps(step, graphs.CudaCapture(device))
    inputs = (torch.randn(4, 3, 8, 8, device=device), torch.arange(4, device=device), torch.arange(4, device=device))
    with torch.no_grad(), collector:
        steps(*inputs)
        collector.restart()
        torch.cuda.set_sync_debug_mode("error")
        try:
            steps(*inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        steps(*inputs)  # records, which may wait
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                steps(*inputs)
            moved = graphs.upload(torch.arange(3), device)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert steps.replayed == 4 and moved.tolist() == [0, 1, 2]
    tables = collector.tables()
    expected = 5 * inputs[0].square().sum((2, 3)).cpu()
    torch.testing.assert_close(tables["conv_in"], expected, rtol=1e-5, atol=0)


@pytest.mark.gpu
@needs_gpu
def test_a_step_that_cannot_be_captured_falls_back_on_the_gpu(caplog: pytest.LogCaptureFixture) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    steps = Steps(lambda x: x + float(x.sum()), graphs.CudaCapture(device))
    with caplog.at_level(logging.WARNING, logger="wanda_fast"):
        results = [steps(torch.ones(2, device=device)).tolist() for _ in range(WARM_UP + 3)]
    assert results == [[3.0, 3.0]] * (WARM_UP + 3)
    assert "no CUDA graph" in caplog.text and steps.replayed == 0
    torch.cuda.manual_seed(3)  # and the device's random numbers go on as if nothing had been tried
    want = torch.randn(5, generator=torch.Generator(device).manual_seed(3), device=device)
    assert torch.equal(torch.randn(5, device=device), want)
