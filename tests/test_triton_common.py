"""How kernels are launched, without a GPU: a kernel that stands in notes what it was called with."""
import pytest
import torch

common = pytest.importorskip("kernels.triton_common", reason="Triton is not installed")


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
        launch(None, u, u)
    assert launch.kernel.calls == [((3, 2, 1), 4, (7, 32), {"num_warps": 4, "num_stages": 1})]
    assert launch.kernel.compiled.calls == [((3, 2, 1), 4, (7, 32), {})] * 2


def test_an_address_that_is_no_multiple_of_16_is_left_to_triton(launch, monkeypatch):
    """It was compiled for 16-byte accesses, and one compiled for less serves nothing else."""
    monkeypatch.setattr(common, "INTERPRETED", False)
    u = torch.zeros(64)
    launch(None, u, u[1:])
    launch(None, u, u)
    launch(None, u[1:], u)
    assert len(launch.kernel.calls) == 3 and not launch.kernel.compiled.calls
    launch(None, u, u)
    assert len(launch.kernel.calls) == 3 and len(launch.kernel.compiled.calls) == 1


def test_a_kernel_is_launched_on_its_tensors_gpu(launch, monkeypatch):
    entered = []

    class Device:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            entered.append(self.index)

        def __exit__(self, *error):
            pass
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", Device)
    u = torch.zeros(64)
    launch(0, u, u)
    assert not entered
    launch(1, u, u)
    assert entered == [1]
