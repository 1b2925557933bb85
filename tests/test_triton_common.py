"""How kernels are launched, without a GPU: a kernel that stands in notes what it was called with."""
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
from vision_kan.kernels import triton_activation, triton_columns  # noqa: E402
from vision_kan.kernels import triton_common as common  # noqa: E402


class Kernel:
    """As a `triton.jit` function: a launch returns what was compiled, which is launched the same way."""

    def __init__(self, label="jit"):
        self.label, self.arg_names, self.calls = label, ["u", "v", "size", "BLOCK"], []
        self.compiled = Kernel("compiled") if label == "jit" else None

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.calls.append((grid, len(args), args[2:], options))
            return self.compiled
        return launch


@pytest.fixture
def launch():
    return common.Launch(Kernel(), (3, 2, 1), {"BLOCK": 32, "size": 7, "of another kernel": 0}, 4)


def test_the_compiled_kernel_is_called_after_the_first_launch(launch, monkeypatch):
    monkeypatch.setattr(common, "INTERPRETED", False)
    u = torch.zeros(64)
    for _ in range(3):
        launch(True, u, u)
    assert launch.kernel.calls == [((3, 2, 1), 4, (7, 32), {"num_warps": 4, "num_stages": 1})]
    assert launch.kernel.compiled.calls == [((3, 2, 1), 4, (7, 32), {})] * 2


def test_an_address_that_is_no_multiple_of_16_is_left_to_triton(launch, monkeypatch):
    """It was compiled for 16-byte accesses, and one compiled for less serves nothing else."""
    monkeypatch.setattr(common, "INTERPRETED", False)
    u = torch.zeros(64)
    launch(False, u, u[1:])
    launch(True, u, u)
    launch(False, u[1:], u)
    assert len(launch.kernel.calls) == 3 and not launch.kernel.compiled.calls
    launch(True, u, u)
    assert len(launch.kernel.calls) == 3 and len(launch.kernel.compiled.calls) == 1


@pytest.mark.parametrize("shape", [(), (5,), (2, 0, 3), (3, 4, 5)])
def test_memory_is_that_of_torch_empty(shape):
    for dtype in (torch.float32, torch.bfloat16):
        with torch.inference_mode(len(shape) == 1):
            got = common.allocator(torch.Size(shape), dtype, torch.device("cpu"))()
            want = torch.empty(shape, dtype=dtype)
        for name in ("shape", "dtype", "device", "requires_grad", "is_leaf"):
            assert getattr(got, name) == getattr(want, name)
        assert got.stride() == want.stride() and got.is_inference() == want.is_inference()


def test_everything_happens_on_the_gpu_of_the_tensors(monkeypatch):
    """Where Triton launches and memory is given out: the current one."""
    current, entered = [0], []

    class Device:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            entered.append(self.index)
            self.before, current[0] = current[0], self.index

        def __exit__(self, *error):
            current[0] = self.before
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(triton_columns, "device_at", lambda where: common.TARGETS["sm_90"])
    u, c = torch.zeros(0, 16), torch.zeros(2, 3)
    plan = triton_activation.Plan(u.dtype, u.shape, u.device, c.shape, False, (-1.0, 0.0, 1.0), 1.0, "gelu")
    given = []
    plan.like_u = lambda: given.append(current[0]) or u
    for index in (None, 0, 1):
        plan.index = index
        plan.forward(u, c, None)
        plan.backward(u, u, c, None)
    assert given == [0, 0, 0, 0, 1, 1] and entered == [1, 1]
