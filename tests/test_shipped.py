"""Trained weights that come with this code: known by name in the place of a checkpoint, checked, written by tools/ship.py."""
import warnings
from types import MappingProxyType

import pytest
import timm
import torch
from e2e import evaluation, run, write_digits
from helpers import GKAN, NANO, TWIN, sentence
from models import spread
from timm.data import resolve_model_data_config

import hubconf
import models_kan
from models_kan import TAGS, ModelSpec
from tools import export, inspect_kan, predict, prune, ship
from vision_kan.checkpoints import shipped
from vision_kan.checkpoints.checkpoint import Checkpoint
from vision_kan.checkpoints.downloads import fetch
from vision_kan.common.errors import UserError
from vision_kan.config.resolve import parse_args
from vision_kan.run.build import model_of_run
from vision_kan.run.starting import effective_config, read_start, suggest_model
from vision_kan.run.trained import default_output, load_trained

NAME, CLASSES = f"{GKAN}.digits", TAGS["digits"].classes
LOCAL = ("--device", "cpu", "--num_workers", "0")


# ---------------------------------------------------------------- what is in the box
def test_every_file_in_the_box():
    found = shipped.shipped()
    assert set(found) == {f"{model}.{tag}" for model in (GKAN, TWIN) for tag in TAGS}
    # a file for each name, a card for each file, and nothing else
    assert {path.name for path in shipped.FOLDER.iterdir()} == {
        "README.md", *(path.name for path in found.values()), *(f"{name}.md" for name in found)}
    for name in found:
        path, checkpoint = shipped.checked(name), Checkpoint.open(name)
        assert path.stat().st_size < 2 * 2 ** 20
        trained, model = load_trained(name, device="cpu"), timm.create_model(name, pretrained=True).eval()
        same_model(trained, model)
        assert checkpoint.state["class_names"] == trained.class_names
        card = (shipped.FOLDER / f"{name}.md").read_text(encoding="utf-8")
        assert trained.results and f"top-1 {trained.results['acc1']:.2f}" in card and f"# {name}\n" in card
        assert f"Classes: {', '.join(trained.class_names)}." in card


def same_model(trained, model) -> None:
    images = torch.randn(2, 3, *model.pretrained_cfg["input_size"][1:])
    assert torch.equal(trained.model(images), model(images))
    assert list(model.pretrained_cfg["label_names"]) == trained.class_names and model.num_classes == len(trained.class_names)
    assert resolve_model_data_config(model) == trained.data_config


# ---------------------------------------------------------------- a box for the tests
@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("data") / "data", train=1, val=2, names=list(CLASSES))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A checkpoint as a run leaves it."""
    return checkpoint_of(GKAN, tmp_path_factory.mktemp("run") / "checkpoint.pth")


def checkpoint_of(name, place, seed: int = 1, classes=CLASSES, kwargs=MappingProxyType({}), flags=MappingProxyType({})):
    torch.manual_seed(seed)
    model = spread(timm.create_model(name, num_classes=len(classes), **kwargs), seed)
    result = {"acc1": 12.34, "acc5": 56.78, "images": 20, "data_set": "FOLDER", "split": "validation"}
    torch.save({
        "model": model.state_dict(), "model_ema": model.state_dict(),
        "model_args": {"name": name, "kwargs": {"num_classes": len(classes), "img_size": 32, **kwargs}},
        "args": {**flags, "model": name, "input_size": 32, "data_set": "FOLDER", "epochs": 2,
                 "config": "/somewhere/recipes/cifar10_gkan.yaml"},
        "epoch": 1, "class_names": list(classes), "results": {"model": result, "model_ema": result},
        "versions": {"torch": "2.7.0", "platform": "a-platform"}}, place)
    return place


@pytest.fixture(scope="module")
def box(tmp_path_factory, file, data):
    """A folder with the file's weights in the place of vision_kan/pretrained."""
    folder = tmp_path_factory.mktemp("pretrained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shipped, "FOLDER", folder)
        assert ship.main([str(file), "digits", "--weights", "model_ema", "--data-path", str(data), "--note", "On a machine.",
                          *LOCAL]) == 0
        register_again()
        yield folder
    register_again()


def register_again() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")         # timm's, of a name that it knows
        models_kan._register("vit_nano_patch8_32", models_kan.SIZES["vit_nano_patch8_32"], "GKAN", models_kan.GroupKAN)


def test_every_tag_has_its_data_described():
    assert ship.DATA.keys() == TAGS.keys()


# ---------------------------------------------------------------- writing
def test_what_is_written(box, file):
    path = shipped.shipped()[NAME]
    assert {place.name for place in box.iterdir()} == {path.name, f"{NAME}.md"} and path.stat().st_size < 2 ** 20
    state, own = Checkpoint.open(file).weights("model_ema"), Checkpoint.open(NAME).weights()
    assert all(torch.equal(own[key], value.half() if value.ndim > 1 else value) for key, value in state.items())
    card = (box / f"{NAME}.md").read_text()
    for words in (f"# {NAME}\n", "The moving average: top-1", "20 images of scikit-learn's digits, validation", "top-1 12.34",
                  "On a machine.",
                  "`python main.py --config recipes/cifar10_gkan.yaml --data-path DIR", "2 epochs done", "torch 2.7.0",
                  "Alpaydin", "Classes: 0, 1, 2"):
        assert words in card, words
    assert "somewhere" not in card and "a-platform" not in card
    assert "somewhere" not in (text := path.read_bytes().decode(errors="ignore")) and "a-platform" not in text


def test_new_weights_replace_the_old(file, data, tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "box")
    paths = []
    for seed in (1, 2):
        place = checkpoint_of(TWIN, tmp_path / f"{seed}.pth", seed)
        assert ship.main([str(place), "digits", "--data-path", str(data), *LOCAL]) == 0
        paths += shipped.shipped().values()
    assert len(paths) == 2 and not paths[0].exists() and paths[1].exists()


def test_what_is_not_shipped(data, tmp_path, capsys):
    few = checkpoint_of(GKAN, tmp_path / "few.pth", classes=CLASSES[:3])
    foreign = tmp_path / "foreign.pth"
    torch.save({"model": timm.create_model("test_vit", num_classes=10).state_dict(), "class_names": list(CLASSES),
                "model_args": {"name": "test_vit", "kwargs": {"num_classes": 10}}, "args": {}}, foreign)
    full = checkpoint_of(GKAN, tmp_path / "full.pth")
    for words, told in (([few, "digits"], "has the classes 0, 1, 2 ..., which are not those of TAG digits"),
                        ([foreign, "digits"], "holds test_vit: only models of --list-models"),
                        ([full, "digits"], "give --data-path DIR"), ([full, "digit"], "digit")):
        assert ship.main([*map(str, words), *LOCAL]) == 2
        assert told in capsys.readouterr().err


def test_a_tag_with_its_own_architecture_and_preparation(tmp_path, monkeypatch, capsys):
    """The name alone creates the model, with the arguments and the preparation that the tag has."""
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "box")
    tag = TAGS["cifar10"]
    own = {"classes": tag.classes, "kwargs": tag.kwargs, "flags": {"mean": list(tag.mean), "std": list(tag.std)}}
    place = checkpoint_of(GKAN, tmp_path / "a.pth", **own)
    data = write_digits(tmp_path / "data", train=1, val=1, names=list(tag.classes))
    grey = {"mean": [0.5] * 3, "std": list(tag.std)}
    for changed, told in (({"kwargs": {"global_pool": "avg"}}, "class_token None and not False"),
                          ({"kwargs": {**tag.kwargs, "kan_groups": 4}}, "kan_groups 4 and not 8"),
                          ({"flags": grey}, "mean (0.5, 0.5, 0.5) and not (0.4914, 0.4824, 0.4467)"),
                          ({"flags": {**own["flags"], "interpolation": "bilinear"}}, "interpolation bilinear and not bicubic")):
        other = checkpoint_of(GKAN, tmp_path / "b.pth", **{**own, **changed})
        assert ship.main([str(other), "cifar10", "--data-path", str(data), *LOCAL]) == 2
        assert f"has {told}, which a model of the name {GKAN}.cifar10 has: ship one" in capsys.readouterr().err
    assert not shipped.FOLDER.exists()
    place = checkpoint_of(GKAN, tmp_path / "a.pth", **{**own, "kwargs": {**tag.kwargs, "kan_groups": 8}})      # the default
    assert ship.main([str(place), "cifar10", "--data-path", str(data), *LOCAL]) == 0
    register_again()
    try:
        name = f"{GKAN}.cifar10"
        model = timm.create_model(name, pretrained=True).eval()
        same_model(load_trained(name, device="cpu"), model)
        assert model.cls_token is None and model.global_pool == "avg" and model.pretrained_cfg["mean"] == tag.mean
        assert timm.create_model(name).cls_token is None and timm.create_model(GKAN).cls_token is not None
        assert timm.create_model(name, pretrained=True, num_classes=3).head.out_features == 3
        for words in ((), ("--model", GKAN), ("--model", NANO)):
            config = parse_args(["--finetune", name, *words])
            start = read_start(config)
            tuned, _ = model_of_run(effective_config(config, start), start, 3, torch.device("cpu"), lambda: None)
            assert tuned.cls_token is None and torch.equal(tuned.pos_embed, model.pos_embed)
            assert torch.equal(tuned.fc_norm.weight, model.fc_norm.weight)
    finally:
        monkeypatch.undo()
        register_again()


# ---------------------------------------------------------------- the name in the place of a checkpoint
def test_for_timm_and_torch_hub(box):
    trained = load_trained(NAME, device="cpu")
    model = timm.create_model(NAME, pretrained=True).eval()
    same_model(trained, model)
    same_model(trained, hubconf._entry(NAME)(pretrained=True).eval())
    same_model(trained, hubconf.checkpoint(NAME))
    assert NAME in timm.list_pretrained("vit_nano*") and "feed-forward GKAN" in hubconf._entry(NAME).__doc__
    # to be fine-tuned, as backbone, and without the weights
    other = timm.create_model(NAME, pretrained=True, num_classes=3)
    assert other.head.out_features == 3 and torch.equal(other.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)
    assert len(timm.create_model(NAME, pretrained=True, features_only=True)(torch.zeros(1, 3, 32, 32))) == 3
    assert timm.create_model(NAME).num_classes == 10 and timm.create_model(GKAN).num_classes == 1000
    with pytest.raises(ValueError, match=f"^{GKAN} has no pretrained weights of its own: choose {NAME}$"):
        timm.create_model(GKAN, pretrained=True)


def test_for_main(box, data, capsys):
    card = (box / f"{NAME}.md").read_text()
    for flag in ("--resume", "--finetune"):
        assert run("--eval", flag, NAME, "--data-path", data, *LOCAL) == 0
        found = evaluation(capsys.readouterr().out)["model"]
        assert f"top-1 {found[0]} top-5 {found[1]}" in card
    config = parse_args(["--finetune", NAME, "--model", NANO, "--data-path", str(data)])
    model, _ = model_of_run(config, read_start(config), 3, torch.device("cpu"), lambda: torch.zeros(1, 3, 32, 32))
    assert torch.equal(model.blocks[3].attn.qkv.weight, load_trained(NAME, device="cpu").model.blocks[3].attn.qkv.weight)


def test_for_the_tools(box, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    image = str(next((data / "val").rglob("*.png")))
    assert predict.main([NAME, image, "--device", "cpu"]) == 0
    assert len(set(capsys.readouterr().out.split()) & set(CLASSES)) == 5
    assert export.main([NAME, "copy.safetensors"]) == 0
    same_model(load_trained("copy.safetensors", device="cpu"), timm.create_model(NAME, pretrained=True).eval())
    assert str(default_output(NAME, "_inspect")) == f"{NAME}_inspect"


@pytest.mark.slow
def test_for_the_slower_tools(box, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert inspect_kan.main([NAME, "--data-path", str(data), "--device", "cpu"]) == 0
    assert (tmp_path / f"{NAME}_inspect/report.html").is_file()
    assert prune.main([NAME, "small.pth", "--what", "hidden", "--keep-parameters", "0.5", "--data-path", str(data), *LOCAL]) == 0


def test_a_file_or_folder_of_that_name_comes_first(box, tmp_path, monkeypatch):
    assert fetch(NAME).parent == box
    monkeypatch.chdir(tmp_path)
    checkpoint_of(TWIN, tmp_path / NAME)
    assert load_trained(NAME, device="cpu").spec.name == TWIN


# ---------------------------------------------------------------- what is refused
def test_changed_files(box, file, tmp_path, monkeypatch):
    path = shipped.shipped()[NAME]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    (tmp_path / path.name).write_bytes(content)
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    told = f"the weights of {NAME}, {tmp_path / path.name}, have been changed (their SHA-256 is not the one in the file's name)"
    for call in (lambda: timm.create_model(NAME, pretrained=True), lambda: load_trained(NAME), lambda: hubconf.checkpoint(NAME),
                 lambda: read_start(parse_args(["--finetune", NAME]))):
        assert sentence(call).startswith(told)
    assert timm.create_model(NAME).num_classes == 10        # the architecture needs no file


def test_unknown_tags(box):
    for name in (f"{GKAN}.foo", f"{NANO}.digits"):
        assert not models_kan.register(name)
        with pytest.raises(ValueError, match=f"^{name}: there are no such weights, only {NAME}$"):
            timm.create_model(name, pretrained=True)
        with pytest.raises(UserError, match=f"{name} does not exist: check the path, or name weights .*{NAME}"):
            load_trained(name)
    assert suggest_model(f"{GKAN}.foo") == f" (its tags: {NAME})"
    assert f"(its tags: {NAME})" in sentence(read_start, parse_args(["--finetune", f"{GKAN}.foo"]))


# ---------------------------------------------------------------- names with a tag
def test_names(box):
    assert models_kan.register(NAME) and models_kan.split_name(NAME) == models_kan.split_name(GKAN)
    for name, suffix, expected in ((NAME, "GKAN", NAME), (NAME, "KAT", f"{GKAN[:-5]}_KAT"), (f"{TWIN}.nosuch", "GKAN",
                                   f"{TWIN}.nosuch"), (f"{GKAN[:-5]}.digits", "GKAN", NAME)):
        assert models_kan.with_feed_forward(name, suffix) == expected
    assert models_kan.models_with("kan_groups", NAME) == models_kan.models_with("kan_groups", GKAN) != []
    assert models_kan.options_of(NAME) == models_kan.options_of(GKAN)
    assert models_kan.mlp_twin(ModelSpec(NAME, {"num_classes": 10})).pretrained_cfg["architecture"] == TWIN
