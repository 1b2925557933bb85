"""Graphs on a CPU: what `captured.CudaGraphs` makes on a GPU, from a recorder below autograd. And short trainings that are run
with graphs and without, on either."""
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from engine import evaluate, train_one_epoch
from losses import build_criterion
from vision_kan.common.errors import TrainingFailed
from vision_kan.common.process import Process
from vision_kan.common.text import to_builtin_types
from vision_kan.config.resolve import parse_args
from vision_kan.training.captured import CapturedUpdater, CudaGraphs
from vision_kan.training.criterion import Criterion
from vision_kan.training.optim import build_state
from vision_kan.training.state import TrainState
from vision_kan.training.training import Hooks, Training
from vision_kan.training.updates import Updater

READS_THE_DEVICE = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default,
                    torch.ops.aten.is_nonzero.default)


class RecordedGraphs:
    """A graph keeps every operation with its arguments: scalars are frozen and memory is static, as in a CUDA graph."""

    def __init__(self, *place):
        self.graphs: list[RecordedGraph] = []

    def record(self, function: Callable[[], Any]) -> tuple["RecordedGraph", Any]:
        graph, random = RecordedGraph(), torch.get_rng_state()
        try:
            with graph:
                result = function()
        finally:        # the operations were computed too, for shapes and values: a CUDA graph's are not
            with torch.no_grad():
                for tensor, before in graph.written:
                    tensor.copy_(before)
            torch.set_rng_state(random)
        graph.close()
        self.graphs.append(graph)
        return graph, result


class RecordedGraph(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls: list[tuple] = []
        self.written: list[tuple[Tensor, Tensor]] = []      # tensors from outside, and what was in them
        self.own: set[int] = set()                          # storages made by the graph
        self.replays = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in READS_THE_DEVICE:
            raise RuntimeError(f"{func} reads the device\nwhich a graph cannot")
        arguments = func._schema.arguments
        values = dict(zip((a.name for a in arguments), args)) | kwargs
        for argument in arguments:
            statistics = "batch_norm" in func._schema.name and argument.name.startswith("running_")    # its schema hides them
            if statistics or argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in _tensors(values.get(argument.name)):
                    storage = tensor.untyped_storage().data_ptr()
                    if storage not in self.own and all(tensor is not seen for seen, _ in self.written):
                        self.written.append((tensor, tensor.clone()))
        out = func(*args, **kwargs)
        inputs = {t.untyped_storage().data_ptr() for t in _tensors([args, kwargs])}
        self.own |= {t.untyped_storage().data_ptr() for t in _tensors(out)} - inputs
        self.calls.append((func, args, kwargs, out))
        return out

    def close(self) -> None:
        self.written.clear()

    def replay(self) -> None:
        self.replays += 1
        with torch.no_grad():
            for func, args, kwargs, out in self.calls:
                for old, new in zip(_tensors(out), _tensors(func(*args, **kwargs))):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)


def _tensors(x: Any) -> list[Tensor]:
    if isinstance(x, Tensor):
        return [x]
    if isinstance(x, dict):
        x = list(x.values())
    return [t for y in x for t in _tensors(y)] if isinstance(x, (tuple, list)) else []


CPU, K = torch.device("cpu"), 4


def flags(*argv) -> Namespace:
    return parse_args(["--model", "vit_nano_patch8_32_GKAN", "--epochs", "3", "--warmup-epochs", "1", "--sched-on-updates",
                       "--model-ema-decay", "0.9", *map(str, argv)]).args


def state_of(args: Namespace, model: nn.Module | None = None, dtype=torch.float32, device=CPU) -> TrainState:
    torch.manual_seed(0)
    model = model or timm.create_model(args.model, num_classes=K, depth=1, embed_dim=32, num_heads=2, drop_path_rate=0.3,
                                       proj_drop_rate=0.1)
    return build_state(args, model.to(device), 1e-3, 8, device, dtype)


def batches(n: int, size: int = 4, last: int | None = None, seed: int = 0) -> list:
    random = torch.Generator().manual_seed(seed)
    sizes = [size] * (n - 1) + [last or size]
    return [(torch.randn(b, 3, 32, 32, generator=random), torch.randint(K, (b,), generator=random)) for b in sizes]


def updater_of(state: TrainState, criterion: Criterion, captured_: bool, **options) -> Updater:
    process = Process(device=state.optimizer.param_groups[0]["params"][0].device)
    if not captured_:
        return Updater(state.model, state, criterion, process, **options)
    graphs = CudaGraphs(process.device) if process.device.type == "cuda" else RecordedGraphs()
    return CapturedUpdater(state.model, state, criterion, process, graphs, **options)


def run(captured_: bool, argv=(), loader: Callable[[], list] | None = None,
        criterion: Callable[[], Criterion] | None = None, mixup=None, epochs: int = 3, scaler=None, between=None,
        amp_dtype=torch.float32, clip_grad=None, device=CPU, model=None, hooks: Hooks | None = None, **options):
    """Epochs at a constant learning rate: final state, results of each epoch, updater."""
    args = flags(*argv)
    torch.manual_seed(0)
    state = state_of(args, model and model(), amp_dtype, device)
    state.scaler = scaler() if scaler else state.scaler
    made = criterion() if criterion else build_criterion(args, K, mixup is not None)
    updater = updater_of(state, made, captured_, amp_dtype=amp_dtype, clip_grad=clip_grad)
    training = Training(updater, mixup, epochs=epochs, print_freq=4, **options)
    loader, results = (loader or (lambda: batches(9, last=3)))(), []       # mixup works in place: new ones
    try:
        while state.epoch < epochs:
            trained = train_one_epoch(training, loader, hooks or Hooks())
            results.append((trained["loss"], trained["lr"], between(state) if between else None))
            state.next_epoch()
    except TrainingFailed as error:
        results.append(str(error))
    state.seconds = 0
    return to_builtin_types(state.state_dict()), results, updater


def assert_same(a, b, where=""):
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b)):
            assert_same(*pair, f"{where}[{i}]")
    else:
        assert a == b or a != a and b != b, where


def evaluation(state: TrainState):
    process = Process(device=next(state.model.parameters()).device)
    return [evaluate(model, batches(2, seed=9), process) for model in (state.model, state.ema.module)]


class Net(nn.Module):
    """A model with BatchNorm, without a moving average: the graph updates its statistics."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head, self.unused = nn.Conv2d(3, 4, 8, 8), nn.BatchNorm2d(4), nn.Linear(64, K), nn.Linear(2, 2)

    def forward(self, x):
        return self.head(F.dropout(self.norm(self.conv(x)).flatten(1), 0.3, self.training))


class Reading(Net):
    """Control flow that depends on data."""

    def forward(self, x):
        return super().forward(x) * (2 if x.mean() > 0 else 1)
