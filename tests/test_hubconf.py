"""hubconf.py through torch.hub, as another program calls it from another folder."""
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from e2e import QUICK, run, write_digits
from helpers import ROOT

import hubconf
import models_kan
from vision_kan.checkpoints.shipped import shipped
from vision_kan.common.errors import UserError
from vision_kan.run.trained import load_trained

PROGRAM = f"""
import sys, timm, torch
torch.hub.set_dir(sys.argv[3])
load = lambda *words, **kwargs: torch.hub.load({str(ROOT)!r}, *words, source="local", **kwargs)
model = load("vit_nano_patch8_32_GKAN", num_classes=5, kan_groups=4)
assert model.blocks[0].mlp.phi2.coefficients.shape == (4, 8) and model._model_args["kan_groups"] == 4
trained = load("checkpoint", sys.argv[1])
assert not [path for path in sys.path if path == {str(ROOT)!r}]
images = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
trained.train()(images).sum().backward()                # it can be trained on
assert all(parameter.grad is not None for parameter in trained.parameters())
with torch.no_grad():
    torch.save(trained.eval()(images), sys.argv[2])
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    data = write_digits(folder / "data")
    model = "vit_nano_patch8_32_GKAN"
    assert run(*QUICK, "--model", model, "--data-path", data, "--epochs", 1, "--output_dir", folder / "run") == 0
    return folder / "run" / "checkpoint.pth"


@pytest.mark.slow
def test_from_another_program(checkpoint, tmp_path):
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(checkpoint), str(tmp_path / "y.pt"), str(tmp_path)], cwd=tmp_path,
                          capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    images = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
    torch.testing.assert_close(torch.load(tmp_path / "y.pt"), load_trained(str(checkpoint), device="cpu").model(images),
                               rtol=0, atol=1e-5)


def test_every_registered_model_is_an_entry_point():
    entries = {name for name in vars(hubconf) if callable(getattr(hubconf, name)) and not name.startswith("_")}
    assert entries == {*models_kan.registered_models(), *shipped(), "checkpoint"}
    model = hubconf.vit_nano_patch8_32_KAN(hdim_kan=20)
    assert model.blocks[0].mlp.layers[0].out_features == 20 and "feed-forward KAN" in hubconf.vit_nano_patch8_32_KAN.__doc__


def test_a_checkpoint_tells_its_images_and_classes(checkpoint):
    model = hubconf.checkpoint(str(checkpoint), weights="model_ema")
    assert model.pretrained_cfg["label_names"] == ["digit0", "digit1", "digit2"] and not model.training
    config = timm.data.resolve_model_data_config(model)
    assert config["input_size"] == (3, 32, 32) and config["crop_pct"] == 1.0
    with pytest.raises(UserError, match="does not exist"):
        hubconf.checkpoint("nowhere.pth")


@pytest.mark.slow
def test_dependencies_are_what_is_imported():
    """Every package beside the standard library that our modules import when they are loaded, in a program of their own."""
    program = ("import sys, hubconf, vision_kan.run.trained; "
               "print(*(getattr(module, '__file__', None) for module in list(sys.modules.values())), sep='\\n')")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    ours = [path for path in map(Path, done.stdout.splitlines()) if path.is_relative_to(ROOT)
            and not path.is_relative_to(ROOT / ".venv") and "triton" not in path.name]
    imported = {line.split()[1].split(".")[0] for path in ours for line in path.read_text().splitlines()
                if line.startswith(("import ", "from "))}
    others = imported - set(sys.stdlib_module_names) - {path.stem for path in ROOT.glob("*.py")} - {"vision_kan"}
    assert ROOT / "vision_kan/run/trained.py" in ours and others == set(hubconf.dependencies)
    assert all(importlib.util.find_spec(name) for name in hubconf.dependencies)
