"""tools/export.py and tools/push_to_hub.py as a user calls them: every format, loaded by those who would load it."""
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
import yaml
from e2e import QUICK, evaluation, run, write_digits
from helpers import EKAN, GKAN, KAT, NANO, RELEASED, ROOT, every, needs_released
from PIL import Image
from safetensors.torch import save
from timm.layers import to_2tuple

from tools import export, push_to_hub
from vision_kan.checkpoints.read import load_file
from vision_kan.data.transforms import EvalTransform
from vision_kan.run.trained import Pictures, image_files, load_trained

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory):
    """A checkpoint after an epoch on real digits, and its data."""
    folder = tmp_path_factory.mktemp("run")
    data = write_digits(folder / "data")
    assert run(*QUICK, "--model", GKAN, "--kan-groups", "4", "--kan-h", "0.9", "--data-path", data, "--epochs", 1,
               "--lr", "0.01", "--output_dir", folder / "run") == 0
    return folder / "run" / "checkpoint.pth", data


def digits(file: Path, data: Path) -> torch.Tensor:
    """The validation images as the model takes them."""
    pictures = Pictures(image_files([data / "val"]), load_trained(str(file), device="cpu").args)
    return torch.cat([images for images, _ in pictures])


@torch.inference_mode()
def logits(model, images):
    return model(images)


# ---------------------------------------------------------------- weights with their description
@slow
@pytest.mark.parametrize("weights", ["model", "model_ema"])
def test_safetensors(weights, trained_run, tmp_path, capsys):
    file, data = trained_run
    target = tmp_path / "deep" / "m.safetensors"
    assert export.main([str(file), str(target), "--weights", weights, "--check", str(data / "val")]) == 0
    assert "equal bit for bit" in capsys.readouterr().out
    source, content, images = load_file(file), load_file(target), digits(file, data)
    assert all(torch.equal(source[weights][key], value) for key, value in content["model"].items())
    expected = logits(load_trained(str(file), weights=weights, device="cpu").model, images)
    spec = content["model_args"]
    ours = timm.create_model(spec["name"], checkpoint_path=target, **spec["kwargs"]).eval()
    assert torch.equal(logits(ours, images), expected)
    assert run("--eval", "--resume", target, "--data-path", data, "--device", "cpu", "--num_workers", 0) == 0
    by_main = evaluation(capsys.readouterr().out)["model"]
    assert run("--eval", "--resume", file, "--data-path", data, "--device", "cpu", "--num_workers", 0) == 0
    assert by_main == evaluation(capsys.readouterr().out)[weights]
    assert content["class_names"] == ["digit0", "digit1", "digit2"] and content["args"]["lr"] == 0.01
    assert os.fsencode(file.parent.parent) not in target.read_bytes()        # nor any other place on this machine
    assert [path.name for path in target.parent.iterdir()] == ["m.safetensors"] and target.stat().st_mode & 0o777 == 0o644


def test_a_folder_for_timm_and_main(trained_run, tmp_path, capsys):
    file, data = trained_run
    folder = tmp_path / "folder"
    assert export.main([str(file), str(folder), "--data-path", str(data), "--num_workers", "0"]) == 0
    capsys.readouterr()
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    model, images = timm.create_model(f"local-dir:{folder}", pretrained=True).eval(), digits(file, data)
    assert torch.equal(logits(model, images), logits(load_trained(str(file), device="cpu").model, images))
    assert model.pretrained_cfg["label_names"] == ["digit0", "digit1", "digit2"]
    config = json.loads((folder / "config.json").read_text())
    assert config["model_args"]["kan_groups"] == 4 and config["model_args"]["kan_h"] == 0.9
    assert "drop_path_rate" not in config["model_args"]
    weights = folder / "model.safetensors"
    assert run("--eval", "--resume", weights, "--data-path", data, "--device", "cpu", "--num_workers", 0) == 0
    top1, top5, count = evaluation(capsys.readouterr().out)["model"]
    assert result_in(folder) == f"The trained weights: top-1 {top1} top-5 {top5} ({count} images of FOLDER, validation)."


def result_in(folder: Path) -> str:
    """What a model card says of results."""
    return " ".join((folder / "README.md").read_text().partition("## Results")[2].partition("## Model")[0].split())


@slow
def test_the_card_has_the_figure_of_the_exported_weights_alone(trained_run, tmp_path, capsys):
    file, data = trained_run
    assert run("--eval", "--resume", file, "--data-path", data, "--device", "cpu", "--num_workers", 0) == 0
    by_main, source = evaluation(capsys.readouterr().out), load_file(file)
    # the best of the run is another epoch's
    torch.save({**source, "max_accuracy": 98.76, "max_accuracy_ema": 98.76}, tmp_path / "last.pth")
    torch.save({**source, "max_accuracy": 98.76, "results": {}}, tmp_path / "within.pth")
    torch.save({key: value for key, value in source.items() if key != "results"}, tmp_path / "old.pth")
    for weights, held in (("model", "trained weights"), ("model_ema", "moving average")):
        top1, top5, count = by_main[weights]
        said = f"top-1 {top1} top-5 {top5} ({count} images of FOLDER, validation)."
        file, folder, again = (tmp_path / f"{weights}{ending}" for ending in (".safetensors", "", "_again"))
        for target in (file, folder):
            assert export.main([str(tmp_path / "last.pth"), str(target), "--weights", weights]) == 0
        assert result_in(folder) == f"The {held}: {said}" and "98.76" not in (folder / "README.md").read_text()
        assert load_file(file)["results"] == {"model": source["results"][weights]} and "max_accuracy" not in load_file(file)
        assert export.main([str(file), str(again)]) == 0 and result_in(again).endswith(said)
    for source, *more in (["within.pth"], ["old.pth"], ["last.pth", "--mean", "0.4", "0.4", "0.4"]):     # other images
        folder = tmp_path / f"of_{source}".replace(".", "_")
        assert export.main([str(tmp_path / source), str(folder), *more]) == 0
        assert "not been evaluated" in result_in(folder) and "--data-path DIR" in result_in(folder)
        assert "98.76" not in (folder / "README.md").read_text() and "model-index" not in (folder / "README.md").read_text()
    assert export.main([str(tmp_path / "within.pth"), str(tmp_path / "m.safetensors"), "--data-path", str(data), "--num_workers",
                        "0"]) == 0
    top1, top5, count = by_main["model"]
    assert f"model: top-1 {top1} top-5 {top5} ({count} images of FOLDER, validation)" in capsys.readouterr().out
    assert f"{load_file(tmp_path / 'm.safetensors')['results']['model']['acc1']:.2f}" == top1


def test_the_model_card(trained_run, tmp_path):
    file, data = trained_run
    trained = load_trained(str(file), device="cpu")
    trained.results = {"acc1": 61.234, "acc5": 99.0, "images": 24, "data_set": "hfds/a`b", "split": "0.2 held out by seed 3"}
    trained.about["class_names"] = ["a`b\n# c", "<b>", "d"]
    trained.about["args"]["finetune"] = "/home/somebody/deit_tiny.pth"
    text = export.model_card(trained)
    _, header, body = text.split("---\n", 2)
    header = yaml.safe_load(header)
    assert (header["license"], header["library_name"]) == ("apache-2.0", "timm")
    assert header["model-index"][0]["results"][0]["metrics"][0] == {"type": "accuracy", "value": 61.23, "name": "top-1"}
    assert header["model-index"][0]["results"][0]["dataset"] == {"name": "hfds/a'b", "type": "hfds/a'b",
                                                                  "split": "0.2 held out by seed 3"}
    for words in (f"# {GKAN}", "top-1 61.23 top-5 99.00 (24 images of hfds/a'b, 0.2 held out by seed 3)",
                  "kan_groups: 4", "lr: 0.01", "warmup_epochs: 0", "1 epochs done", f"torch: {torch.__version__.split('+')[0]}",
                  "Apache-2.0", 'timm.create_model("hf-hub:USER/NAME", pretrained=True)', "`deit_tiny.pth`", "`a'b # c`"):
        assert words in body, words
    assert "somebody" not in text and str(tmp_path.parent) not in text and "\n# c" not in text and "epochs: 300" not in text
    for block in body.split("```yaml\n")[1:]:
        assert isinstance(yaml.safe_load(block.partition("```")[0]), dict)
    # no results, and no flags: it says so
    trained.about.clear()
    trained.results = None
    text = export.model_card(trained)
    assert "have not been evaluated" in text and "The checkpoint has none." in text and "model-index" not in text


def test_letters_stay_letters(trained_run, tmp_path):
    trained = load_trained(str(trained_run[0]), device="cpu")
    trained.about["class_names"] = ["größe", "猫", "c"]
    export.write_folder(trained, tmp_path / "folder")
    for name in ("README.md", "config.json", "model.safetensors"):
        assert "größe".encode() in (tmp_path / "folder" / name).read_bytes(), name
    assert json.loads((tmp_path / "folder" / "config.json").read_bytes())["label_names"] == ["größe", "猫", "c"]
    assert load_file(tmp_path / "folder" / "model.safetensors")["class_names"] == ["größe", "猫", "c"]


@pytest.mark.parametrize("size, shape", [(32, (32, 32)), (64, (90, 70)), ([48, 80], (90, 70)), ([24, 32], (24, 32))])
def test_timm_prepares_an_image_as_we_do(size, shape, trained_run):
    trained = load_trained(str(trained_run[0]), device="cpu")
    trained.args.input_size = size
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))
    theirs = timm.data.create_transform(**trained.data_config)(image)
    assert torch.equal(theirs, EvalTransform(size, trained.args.eval_crop_ratio)(image))


@needs_released
def test_a_file_of_the_original_code(tmp_path):
    assert export.main([str(RELEASED), str(tmp_path / "folder"), "--weights", "model_ema"]) == 0
    model = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).eval()
    images, source = torch.randn(2, 3, 64, 64), load_trained(str(RELEASED), weights="model_ema", device="cpu")
    assert torch.equal(logits(model, images), logits(source.model, images))
    again = load_trained(str(tmp_path / "folder" / "model.safetensors"), device="cpu")      # with the original's block norms
    assert torch.equal(logits(again.model, images), logits(model, images))


@pytest.mark.parametrize("target", ["folder", "m.safetensors"])
def test_an_oblong_model_keeps_its_size(target, tmp_path):
    trained = of_kind(*KINDS[-1], tmp_path)
    assert trained.args.input_size == [24, 40] and export.export(trained, tmp_path / target).error == 0
    again = load_trained(str(tmp_path / target), device="cpu")
    assert again.args.input_size == [24, 40] and again.data_config["input_size"] == (3, 24, 40)
    if target == "folder":
        assert "FLOPs an image of 24 x 40 px" in (tmp_path / target / "README.md").read_text()
        (tmp_path / target / "model.safetensors").write_bytes(save(trained.model.state_dict()))    # with config.json alone
        again = load_trained(str(tmp_path / target), device="cpu")
        assert again.args.input_size == [24, 40] and again.model(torch.zeros(1, 3, 24, 40)).shape == (1, 7)


def test_a_model_of_timms(tmp_path):
    model = timm.create_model("resnet10t", num_classes=7)
    torch.save({"model": model.state_dict(), "args": {"model": "resnet10t"}}, tmp_path / "r.pth")
    assert export.main([str(tmp_path / "r.pth"), str(tmp_path / "folder"), "--input-size", "64"]) == 0
    other, images = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True), torch.randn(2, 3, 64, 64)
    assert torch.equal(logits(other.eval(), images), logits(model.eval(), images))


# ---------------------------------------------------------------- programs
COVERING = {"kan_basis": "covering", "kan_second_norm": "static", "kan_base_branch": True}
KINDS = [(GKAN, {"kan_trainable_base": True}), (NANO, {}), (NANO, COVERING), (EKAN, {}), (KAT, {}),
         ("deit_tiny_distilled_patch16_224_ViT", {"img_size": 32}),
         ("deit3_small_patch16_224_KAN", {"img_size": 32, "hdim_kan": 24}), (GKAN, {"img_size": [24, 40]})]


def of_kind(name: str, kwargs: dict, folder: Path):
    """A model of one block whose every parameter, the learned functions' too, is away from where it begins."""
    torch.manual_seed(1)
    spec = {"name": name, "kwargs": {"num_classes": 7, "depth": 1, **kwargs}}
    model = timm.create_model(name, **spec["kwargs"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    torch.save({"model": model.state_dict(), "model_args": spec}, folder / "c.pth")
    return load_trained(str(folder / "c.pth"), device="cpu")


@torch.inference_mode()
def off(trained, call) -> float:
    """Largest difference of a program's logits from PyTorch's in float64, relative to the largest, for several batch sizes."""
    model, worst = timm.create_model(trained.spec.name, **trained.spec.kwargs).eval().double(), 0.0
    model.load_state_dict(trained.model.state_dict())
    for count in (1, 3, 8):
        images = torch.randn(count, 3, *to_2tuple(trained.args.input_size), generator=torch.Generator().manual_seed(count))
        expected, got = model(images.double()), call(images)
        assert got.shape == (count, 7) and got.dtype == torch.float32
        worst = max(worst, ((got - expected).abs().max() / expected.abs().max()).item())
    return worst


@slow
@pytest.mark.parametrize("name, kwargs", KINDS, ids=str)
def test_onnx(name, kwargs, tmp_path):
    import onnx
    import onnxruntime
    trained = of_kind(name, kwargs, tmp_path)
    found = export.export(trained, tmp_path / "m.onnx")
    assert found.images == sum(export.NOISE_BATCHES) and found.fits(exact=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    assert off(trained, lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])) < 1e-4
    model = onnx.load(str(tmp_path / "m.onnx"))
    onnx.checker.check_model(model)
    assert {node.domain for node in model.graph.node} == {""} and not model.functions       # ONNX's own operations alone
    said = json.loads({entry.key: entry.value for entry in model.metadata_props}["vision_kan"])
    shape = [3, *to_2tuple(trained.args.input_size)]
    assert said["model_args"]["name"] == name and said["data_config"]["input_size"] == shape
    for value, rest in ((model.graph.input[0], shape), (model.graph.output[0], [7])):
        batch, *others = value.type.tensor_type.shape.dim
        assert batch.dim_param == "batch" and [dim.dim_value for dim in others] == rest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.pth", "m.onnx"]


@slow
@pytest.mark.parametrize("name, kwargs", [KINDS[0], *(pytest.param(*kind, marks=slow) for kind in KINDS[2::4])], ids=str)
def test_pt2(name, kwargs, tmp_path):
    trained = of_kind(name, kwargs, tmp_path)
    export.export(trained, tmp_path / "m.pt2")
    extra = {"vision_kan.json": ""}
    program = torch.export.load(tmp_path / "m.pt2", extra_files=extra)
    assert off(trained, program.module()) < 1e-4
    assert json.loads(extra["vision_kan.json"])["model_args"]["name"] == name
    assert all(str(node.target).startswith("aten.") or "getitem" in str(node.target) for node in program.graph.nodes
               if node.op == "call_function" and "_guards" not in str(node.target))


@slow
def test_commands_and_python_of_the_document(trained_run, tmp_path, monkeypatch, capsys):
    """docs/export.md from its first line to its last, but for the push, on a run's checkpoint."""
    file, data = trained_run
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "export.md").read_text()
    commands = re.findall(r"^python tools/export.py (.*)", text, re.MULTILINE)
    assert len(commands) == 4
    for command in commands:
        words = [{"CHECKPOINT": str(file), "DIR": str(data)}.get(word, word) for word in command.split()]
        assert export.main([*words, "--num_workers", "0"]) == 0
        out, err = capsys.readouterr()
        images = 80 if "--check" in command else 8
        assert f"logits of {images} images" in out
        told = [line for line in err.splitlines() if not line.startswith("KAN layers")]
        assert not told or "--data-path" in command         # the evaluation's progress
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for block in blocks:
        block = block.replace("PATH_OF_THIS_CODE", str(ROOT)).replace("FILE_OR_URL", str(file))
        exec(compile(block, "docs/export.md", "exec"), names)
    assert len(blocks) == 4 and names["names"] == names["about"]["class_names"] == ["digit0", "digit1", "digit2"]
    assert names["logits"].shape == (3, 3) and names["model"].head.out_features == 10 and names["trained"].num_classes == 3


@slow
@needs_released
def test_programs_of_the_original_code(tmp_path, capsys):
    """Each of its 12 blocks doubles a rounding: PyTorch's own float32 is off by a twentieth or more, and that is said."""
    for name in ("m.pt2", "m.onnx"):
        assert export.main([str(RELEASED), str(tmp_path / name)]) == 0
        own = re.search(r"PyTorch's float32 from its float64: (\S+)\)", capsys.readouterr().out)
        assert 0.01 < float(own[1]) < 1


# ---------------------------------------------------------------- the check
@pytest.mark.parametrize("target", every(3, ["m.safetensors", "m.pt2", "folder"]))
def test_what_computes_something_else_is_not_kept(target, tmp_path, monkeypatch, capsys):
    trained = of_kind(*KINDS[0], tmp_path)
    torch.save({"model": trained.model.state_dict(), "model_args": {"name": trained.spec.name, "kwargs": trained.spec.kwargs}},
               tmp_path / "c.pth")
    compare = export.compare

    def damaged(model, *args):
        with torch.no_grad():
            model.blocks[0].mlp.phi2.coefficients[0, 3] += 0.01
        return compare(model, *args)

    monkeypatch.setattr(export, "compare", damaged)
    assert export.main([str(tmp_path / "c.pth"), str(tmp_path / target)]) == 1
    err = capsys.readouterr().err
    assert f"{target} was not written" in err and "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["c.pth"]


def test_what_is_allowed():
    assert export.Difference(8, 0, 0).fits(exact=True) and not export.Difference(8, 1e-9, 0).fits(exact=True)
    for error, own, fits in ((9e-5, 1e-7, True), (1.1e-4, 1e-7, False), (9e-4, 1e-4, True), (0.6, 0.2, False),
                             (float("nan"), 0.2, False), (float("inf"), 0, False)):
        assert export.Difference(8, error, own).fits(exact=False) is fits
    model = torch.nn.Linear(2, 2)
    found = export.compare(model, lambda x: model(x)[:1], [torch.randn(3, 2)])        # a batch size that is baked in
    assert not found.fits(exact=False)
    found = export.compare(model, lambda x: model(x) * torch.nan, [torch.randn(3, 2)])
    assert not found.fits(exact=False)


# ---------------------------------------------------------------- mistakes
@pytest.mark.parametrize("words, sentence", [
    (["CHECKPOINT", "m.tflite"], ".tflite is not a format to export to: let it end in .safetensors, .pt2, .onnx"),
    (["CHECKPOINT", "full"], "a folder that is not empty is in the way"),
    (["CHECKPOINT", "full.onnx"], "a folder that is not empty is in the way"),
    (["nowhere.pth", "m.onnx"], "does not exist"),
    (["CHECKPOINT", "m.pt2", "--check", "nowhere"], "nowhere does not exist"),
    (["CHECKPOINT", "m.safetensors", "--check", "broken"], "none of the 1 images of --check can be read"),
    (["CHECKPOINT", "file/m.safetensors"], "file/m.safetensors cannot be written"),
    (["CHECKPOINT", "m.pt2", "--kan-grups", "4"], "--kan-grups")])
def test_mistakes(words, sentence, trained_run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("full", "full.onnx", "broken"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(b"no image")
    (tmp_path / "file").write_bytes(b"")
    before = sorted(tmp_path.rglob("*"))
    assert export.main([str(trained_run[0]) if word == "CHECKPOINT" else word for word in words]) == 2
    err = capsys.readouterr().err
    assert sentence in err and "Traceback" not in err
    assert sorted(tmp_path.rglob("*")) == before


def test_the_source_is_not_replaced(trained_run, tmp_path, capsys):
    target = tmp_path / "m.safetensors"
    assert export.main([str(trained_run[0]), str(target)]) == 0
    before = target.read_bytes()
    assert export.main([str(target), str(target)]) == 2
    assert "is the checkpoint itself, which would be lost" in capsys.readouterr().err and target.read_bytes() == before


def test_packages_that_are_missing(trained_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    assert export.main([str(trained_run[0]), str(tmp_path / "m.onnx")]) == 2
    assert "pip install onnx onnxscript onnxruntime" in capsys.readouterr().err


def test_too_large_for_onnx(trained_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export, "ONNX_BYTES", 10 ** 6)
    assert export.main([str(trained_run[0]), str(tmp_path / "m.onnx")]) == 2
    assert "write a .pt2" in capsys.readouterr().err and not list(tmp_path.iterdir())


# ---------------------------------------------------------------- the Hub
class Hub:
    """Stands in for the client and records the calls."""

    def __init__(self):
        self.repos, self.commits = [], []

    def create_repo(self, repo, private, exist_ok):
        self.repos.append((repo, private, exist_ok))
        return SimpleNamespace(repo_id=repo if "/" in repo else f"somebody/{repo}")

    def create_commit(self, repo, operations, commit_message):
        files = {}
        for operation in operations:
            with operation.as_file() as file:
                files[operation.path_in_repo] = file.read()
        self.commits.append((repo, files))
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo}/commit/1")


@pytest.fixture(scope="module")
def folder(trained_run, tmp_path_factory):
    target = tmp_path_factory.mktemp("hub") / "model"
    assert export.main([str(trained_run[0]), str(target)]) == 0
    return target


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setattr(push_to_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(push_to_hub, "get_token", lambda: "a token")
    return hub


def test_push(folder, hub, tmp_path, capsys):
    assert push_to_hub.main([str(folder), "model", "--private"]) == 0
    assert capsys.readouterr().out == "https://huggingface.co/somebody/model/commit/1\n"
    assert hub.repos == [("model", True, True)]
    (repo, files), = hub.commits
    assert repo == "somebody/model" and files.keys() == {"config.json", "model.safetensors", "README.md"}
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    card = files["README.md"].decode()
    assert "hf-hub:somebody/model" in card and "USER/NAME" not in card and "USER/NAME" in (folder / "README.md").read_text()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert timm.create_model(f"local-dir:{tmp_path}", pretrained=True).num_classes == 3
    huggingface_hub.ModelCard.load(tmp_path / "README.md")          # its header is one that the Hub reads


def test_what_cannot_be_pushed(folder, hub, tmp_path, monkeypatch, capsys):
    def sentence(*words):
        assert push_to_hub.main([str(word) for word in words]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and not hub.commits
        return err

    assert "tools/export.py CHECKPOINT FOLDER" in sentence(tmp_path, "a/b")
    shutil.copytree(folder, tmp_path / "latin")
    (tmp_path / "latin/README.md").write_bytes("größe".encode("latin-1"))
    assert "latin/README.md cannot be read" in sentence(tmp_path / "latin", "a/b") and not hub.repos
    response = SimpleNamespace(status_code=403, headers={}, request=None, url="")
    refused = huggingface_hub.errors.HfHubHTTPError("403", response=response)
    monkeypatch.setattr(hub, "create_repo", lambda *_, **__: raising(refused))
    assert "may write there" in sentence(folder, "other/name")
    monkeypatch.setattr(push_to_hub, "HfApi", huggingface_hub.HfApi)        # the real one from here on
    assert "give USER/NAME" in sentence(folder, "a/b/c")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "cannot be reached" in sentence(folder, "a/b")
    monkeypatch.setattr(push_to_hub, "get_token", lambda: None)
    assert "hf auth login" in sentence(folder, "a/b")


def raising(error):
    raise error
