"""--debug-nan: the batch is kept, replayed, and the layer named."""
import math

import pytest
import timm
import torch
from e2e import QUICK, run, write_digits
from models import nano
from torch import nn

from losses import ClassLoss
from vision_kan.common.process import Process
from vision_kan.config.resolve import parse_args
from vision_kan.training.debug_nan import KeptBatches, replay, replay_non_finite
from vision_kan.training.optim import build_state
from vision_kan.training.precision import autocast
from vision_kan.training.training import Training
from vision_kan.training.updates import NonFinite, Updater

CPU = torch.device("cpu")
CRITERION = ClassLoss(nn.CrossEntropyLoss())


def told(model, images=None, batches=None) -> str:
    images = torch.rand(4, 3, 32, 32) if images is None else images
    batches = batches or [(4, images, torch.tensor([0, 1, 2, 1]))]
    return replay(model, CRITERION, batches, lambda: autocast(CPU, torch.float32), 1.0, (0, 3, 0), None)


@pytest.fixture
def model():
    return nano(num_classes=3, depth=2)


def test_the_first_layer_is_named(model):
    assert "step 5 of epoch 3, not finite: nothing" in told(model)
    with torch.no_grad():
        model.blocks[1].attn.qkv.bias[3] = math.inf
    assert "the output of blocks.1.attn.qkv (Linear; largest input " in told(model)


def test_the_first_layer_of_a_compiled_model_is_named(model):
    """Compiled before the replay adds its hooks, as in a run."""
    model.compile(backend="eager")
    model(torch.rand(4, 3, 32, 32))
    with torch.no_grad():
        model.blocks[0].norm2.bias[3] = math.inf
    assert "the output of blocks.0.norm2 (LayerNorm; largest input " in told(model)


def test_images_and_gradients(model):
    assert "not finite: the images themselves" in told(model, torch.full((4, 3, 32, 32), math.nan))
    model.blocks[0].attn.proj.weight.register_hook(lambda grad: grad * math.nan)
    assert "the gradient of blocks.0.attn.proj.weight (and 0 more tensors)" in told(model)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_batches_of_the_update_are_looked_at_in_turn(model):
    kept = KeptBatches(accumulate=2)
    for step in range(9):
        kept.note(step, torch.full((4, 3, 32, 32), math.nan if step == 6 else 0.5), torch.tensor([0, 1, 2, 1]))
    assert [step for step, _, _ in kept.batches] == [5, 6, 7, 8]
    assert [step for step, _, _ in kept.of_update(7)] == [6, 7]
    assert "step 7 of epoch 3" in told(model, batches=kept.of_update(7))


def test_from_the_command_line(tmp_path, capsys, monkeypatch):
    """A real run whose third batch becomes infinite in one layer."""
    data = write_digits(tmp_path / "digits")
    real, calls = timm.create_model, []

    def create(*args, **kwargs):
        model = real(*args, **kwargs)

        def spoil(module, inputs, output):
            calls.append(1)
            return output * math.inf if len(calls) >= 3 else output

        model.blocks[1].norm1.register_forward_hook(spoil)
        return model

    monkeypatch.setattr(timm, "create_model", create)
    out = tmp_path / "out"
    assert run(*QUICK, "--data-path", data, "--epochs", 1, "--no-model-ema", "--output_dir", out, "--debug-nan") == 1
    err = capsys.readouterr().err
    assert "--debug-nan: replayed step 3 of epoch 0, not finite: the output of blocks.1.norm1 (LayerNorm" in err
    assert "stopped: the loss became nan at step 3 of epoch 0" in err
    kept = torch.load(out / "nan_rank0.pth", weights_only=True)
    assert kept["images"].shape == (16, 3, 32, 32) and kept["step"] == 2 and kept["targets"].shape == (16, 3)
    assert all(tensor.isfinite().all() for tensor in kept["model"].values())


def test_a_folder_that_is_gone_is_told(model, tmp_path):
    args = parse_args(["--model", "vit_nano_patch8_32_KAN"]).args
    state = build_state(args, model, 1e-3, 4, CPU, torch.float32)
    kept = KeptBatches()
    kept.note(0, torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 1]))
    training = Training(Updater(model, state, CRITERION, Process()))
    text = replay_non_finite(NonFinite("", 0), training, kept, str(tmp_path / "gone"))
    assert "could not be written" in text
