"""KANs on timm's architectures: `models_kan.register`, --ffn, and everything that a checkpoint of such a model is used for."""
import json

import pytest
import timm
import torch
from e2e import QUICK, checkpoint, evaluation, run
from helpers import differences
from timm.layers import GluMlp, Mlp, SwiGLU
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import models_kan
from models_kan import ModelSpec
from tools import export, inspect_kan, predict, prune, symbolic
from vision_kan.layers.function_layer import function_layers
from vision_kan.layers.group_kan import GroupActivation, GroupKAN
from vision_kan.layers.replacement import other_mlps, replace_mlps
from vision_kan.models.cost import count_flops, measure_flops

slow = pytest.mark.slow
# One small model of each family: its image size for the tests, the number of its MLPs, whether they are gated, and options.
FAMILIES = {
    "test_vit": (32, 6, False, {}),
    "vit_tiny_patch16_224": (32, 12, False, {}),
    "deit3_medium_patch16_224": (32, 12, False, {}),
    "eva02_tiny_patch14_224": (28, 12, True, {}),                       # SwiGLU
    "vit_tiny_patch16_dinov3_qkvb": (32, 12, False, {}),
    "xcit_nano_12_p16_224": (32, 14, False, {}),
    "test_maxvit": (64, 8, False, {}),
    "cait_xxs24_224": (32, 26, False, {}),
    "swin_tiny_patch4_window7_224": (64, 12, False, {}),
    "mixer_s16_224": (32, 16, False, {"kan_groups": 4}),
    "test_convnext": (32, 9, False, {"kan_base": "gelu"}),              # its own is the tanh form, up to 5e-4 from it
}


def built(name: str, size: int, **options) -> nn.Module:
    assert models_kan.register(name)
    torch.manual_seed(0)
    kwargs = {} if name.startswith("test_convnext") else {"img_size": size}
    return timm.create_model(name, num_classes=3, **kwargs, **options).eval()


# ---------------------------------------------------------------- the models
@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in ("test_vit", "eva02_tiny_patch14_224") else slow)
                                  for name in FAMILIES])
def test_group_kans_begin_as_the_model(name):
    size, count, gated, options = FAMILIES[name]
    model, source = built(f"{name}_GKAN", size, **options), built(name, size)
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(model(images), source(images), rtol=1e-5, atol=1e-3 if "kan_base" in options else 1e-5)
    assert len(function_layers(model)) == count * (1 if gated else 2) and not any(type(m) is Mlp for m in model.modules())
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in source.state_dict().items())
    nn.init.normal_(model.get_classifier().weight)      # some begin as 0
    nn.functional.cross_entropy(model(images), torch.tensor([0, 1])).backward()
    assert all(layer.coefficients.grad.any() for layer in function_layers(model).values())


def test_full_edge_kans_have_the_mlps_parameters():
    def parameters(name: str) -> int:
        return sum(parameter.numel() for parameter in built(name, 32).parameters())
    for name in ("test_vit", "xcit_nano_12_p16_224"):
        for suffix in ("KAN", "EKAN", "KAT"):
            assert parameters(f"{name}_{suffix}") == pytest.approx(parameters(name), rel=0.015)
    # a width for each MLP, as a pruned model has it
    model = built("test_vit_KAN", 32, hdim_kan=[3, 4, 5, 6, 7, 8])
    assert [block.mlp.layers[0].out_features for block in model.blocks] == [3, 4, 5, 6, 7, 8]
    with pytest.raises(ValueError, match="hdim_kan is a whole number above 0, or a list of 6"):
        built("test_vit_KAN", 32, hdim_kan=[3, 4])


def test_gates():
    """y = W2 (phi(Wg x) * Wx x): phi begins as the gate's activation and the maps stay."""
    torch.manual_seed(0)
    for mlp in (SwiGLU(8, 16), GluMlp(8, 32, act_layer=nn.SiLU, gate_last=False), GluMlp(8, 32, act_layer=nn.GELU)):
        x, maps = torch.randn(5, 8), dict(mlp.named_parameters())
        expected = mlp(x)
        assert replace_mlps(mlp, lambda **kwargs: GroupKAN(**kwargs, groups=4)) == 1
        assert isinstance(mlp.act, GroupActivation) and mlp.act.channels == 16 and len(mlp.act.coefficients) == 4
        torch.testing.assert_close(mlp(x), expected)
        assert maps.items() <= dict(mlp.named_parameters()).items()
        nn.init.normal_(mlp.act.coefficients)
        assert not torch.allclose(mlp(x), expected)
    with pytest.raises(ValueError, match="a gated MLP keeps its hidden width"):
        replace_mlps(SwiGLU(8, 16), lambda **kwargs: GroupKAN(**kwargs, groups=4, hdim=8))
    with pytest.raises(ValueError, match=r"^blocks.0.mlp \(192 x 512\): FasterKAN has no function of single channels for a gate"):
        built("eva02_tiny_patch14_224_KAN", 28)


def test_mlps_that_are_no_feed_forwards():
    """Those of position biases map two coordinates to the heads."""
    model = built("vit_relpos_small_patch16_224_GKAN", 32)
    assert not [name for name in function_layers(model) if "rel_pos" in name]
    assert len(function_layers(model)) == 24 and "RelPosMlp" in other_mlps(model)
    assert not other_mlps(built("eva02_tiny_patch14_224_GKAN", 28))
    for width in ("32", True, -1, [3]):
        with pytest.raises(ValueError, match="hdim_kan is a whole number above 0, or a list of 6"):
            built("test_vit_GKAN", 32, hdim_kan=width)


def test_names():
    for name in ("resnet18", "vit_nano_patch8_32_KAN", "test_vit_GKAN", "test_vit_GKAN.r160_in1k"):
        assert models_kan.register(name) and models_kan.register(name)
    for name in ("test_vit_ViT", "test_vit_X", "no_such_model_GKAN", "_GKAN", "", "test_vit.nosuch", "test_vit_GKAN.nosuch",
                 "vit_nano_patch8_32_KAN.nosuch", "test_vit_GKAN_GKAN", "vit_nano_patch8_32_ViT_GKAN"):
        assert not models_kan.register(name)
    assert models_kan.split_name("test_vit_GKAN") == (None, "GKAN") and models_kan.split_name("test_vit") == (None, None)
    assert models_kan.models_with("kan_h", "test_vit_GKAN") == ["test_vit_KAN", "test_vit_GKAN"]
    assert models_kan.own_options(ModelSpec("test_vit_GKAN", {"kan_groups": 4})) | {"hdim_kan": 5} == models_kan.own_options(
        ModelSpec("vit_nano_patch8_32_GKAN", {"kan_groups": 4})) | {"hdim_kan": 5, "kan_base": None}
    assert "test_vit_GKAN" not in models_kan.registered_models()
    # timm's weights, by tag
    assert timm.get_pretrained_cfg("test_vit_GKAN.r160_in1k").url == timm.get_pretrained_cfg("test_vit.r160_in1k").url
    with pytest.raises(ValueError, match="test_vit_KAN has no pretrained weights of its own: start from a checkpoint"):
        timm.create_model("test_vit_KAN", pretrained=models_kan.register("test_vit_KAN"))
    for name, suffix, expected in (
            ("test_vit", "KAT", "test_vit_KAT"), ("test_vit_KAT", "ViT", "test_vit"), ("no_such_model", "KAT", "no_such_model"),
            ("test_vit.r160_in1k", "GKAN", "test_vit_GKAN.r160_in1k"), ("vit_nano_patch8_32", "ViT", "vit_nano_patch8_32_ViT"),
            ("vit_nano_patch8_32_KAN", "GKAN", "vit_nano_patch8_32_GKAN"),
            ("deit_tiny_patch16_224.fb_in1k", "GKAN", "deit_tiny_patch16_224_GKAN"),
            ("vit_nano_patch8_32_KAN.nosuch", "GKAN", "vit_nano_patch8_32_KAN.nosuch"),
            ("deit_tiny_patch16_224", "ViT", "deit_tiny_patch16_224_ViT")):
        assert models_kan.with_feed_forward(name, suffix) == expected


def test_flops_are_counted_as_pytorch_does():
    model = built("xcit_nano_12_p16_224_KAN", 32).train()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, 3, 32, 32))
    found = measure_flops(model.train(), (32, 32))
    assert found.matmul == counter.get_total_flops() and found.elementwise > 0
    assert model.training and not any(module._forward_hooks for module in model.modules())
    own = timm.create_model("vit_nano_patch8_32_GKAN")
    assert measure_flops(own, (32, 32)) == count_flops(own)


# ---------------------------------------------------------------- main.py and the tools
def trained(name: str, ffn: str, data, out, epochs: int = 1, *more) -> None:
    size, _, _, options = FAMILIES[name]
    flags = [word for key, value in options.items() if not (key == "kan_base" and ffn in ("kan", "ekan"))
             for word in (f"--{key}", value)]
    assert run(*QUICK, "--model", name, "--ffn", ffn, "--input-size", size, *flags, "--epochs", epochs, "--data-path", data,
               "--output_dir", out, *more) == 0


@pytest.mark.parametrize("name, ffn", [
    ("test_vit", "gkan"), *(pytest.param(name, ffn, marks=slow) for name, ffn in (
        ("vit_tiny_patch16_224", "kan"), ("eva02_tiny_patch14_224", "gkan"), ("eva02_tiny_patch14_224", "kat"),
        ("vit_tiny_patch16_dinov3_qkvb", "gkan"), ("xcit_nano_12_p16_224", "kat"), ("test_maxvit", "ekan"),
        ("cait_xxs24_224", "gkan"), ("swin_tiny_patch4_window7_224", "gkan"), ("mixer_s16_224", "gkan"),
        ("test_convnext", "kan"), ("test_convnext", "gkan")))])
def test_a_run_is_resumed_evaluated_exported_and_inspected(name, ffn, data, tmp_path, capsys):
    size, out = FAMILIES[name][0], tmp_path / "out"
    trained(name, ffn, data, out)
    known = checkpoint(out)["model_args"]["name"]
    assert known == f"{name}_{ffn.upper()}" and "ffn" not in (out / "args.yaml").read_text()
    capsys.readouterr()
    # the checkpoint alone
    assert run("--eval", "--resume", out / "checkpoint.pth", "--data-path", data, "--device", "cpu", "--num_workers", 0) == 0
    found = evaluation(capsys.readouterr().out)
    last = json.loads((out / "log.txt").read_text().splitlines()[-1])
    assert found["model"][0] == f"{last['test_acc1']:.2f}"
    # one epoch and a resume equal two epochs
    assert run("--resume", "auto", "--output_dir", out, "--data-path", data, "--epochs", 2, "--device", "cpu",
               "--num_workers", 0) == 0
    trained(name, ffn, data, tmp_path / "whole", 2)
    again, whole = checkpoint(out), checkpoint(tmp_path / "whole")
    assert not differences(again["model"], whole["model"]) and not differences(again["optimizer"], whole["optimizer"])
    # a folder for timm, an image, a report
    assert export.main([str(out / "checkpoint.pth"), str(tmp_path / "folder")]) == 0
    assert "equal bit for bit" in capsys.readouterr().out
    card = (tmp_path / "folder/README.md").read_text()
    assert f"models_kan.register('{known}')" in card and f"`{name}` of timm with the feed-forward" in card
    model = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).eval()
    assert not differences(model.state_dict(), again["model"])
    image = next((data / "val").rglob("*.png"))
    assert predict.main([str(tmp_path / "folder"), str(image), "--device", "cpu"]) == 0
    assert inspect_kan.main([str(out / "checkpoint.pth"), str(image), "--data-path", str(data), "--device", "cpu", "--output",
                             str(tmp_path / "report")]) == 0
    assert known in (tmp_path / "report/report.html").read_text()
    assert model(torch.randn(2, 3, size, size)).shape == (2, 3)


@pytest.fixture(scope="module")
def mlp_run(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("mlp") / "out"
    trained("test_vit", "mlp", data, out)
    return out / "checkpoint.pth"


def test_finetuning_from_the_mlps_model(mlp_run, data, tmp_path, capsys):
    assert checkpoint(mlp_run.parent)["model_args"]["name"] == "test_vit"
    common = ("--data-path", data, "--device", "cpu", "--num_workers", 0, "--input-size", 32)
    capsys.readouterr()
    seen = {}
    for words in ((), ("--ffn", "gkan"), ("--model", "test_vit", "--ffn", "gkan"), ("--model", "test_vit_GKAN")):
        assert run("--eval", "--finetune", mlp_run, *common, *words) == 0
        seen[words] = evaluation(capsys.readouterr().out)["model"]
    assert len(set(seen.values())) == 1         # step 0 is the MLP's model
    assert run(*QUICK, *common, "--model", "test_vit", "--ffn", "kat", "--finetune", mlp_run, "--epochs", 1, "--output_dir",
               tmp_path / "out") == 0
    text = capsys.readouterr().out
    assert "act2.weight_numerator  x6  (begins as the MLP's activation" in text and "blocks.*.attn.qkv.weight  x6" in text
    assert checkpoint(tmp_path / "out")["args"]["model"] == "test_vit_KAT"


def test_finetuning_another_size_of_this_project(data, tmp_path, capsys):
    """--ffn without --model keeps the checkpoint's size."""
    assert run(*QUICK, "--model", "vit_nano_patch8_32", "--ffn", "mlp", "--data-path", data, "--epochs", 1, "--output_dir",
               tmp_path / "a") == 0
    saved = checkpoint(tmp_path / "a")
    assert saved["args"]["model"] == "vit_nano_patch8_32_ViT"
    capsys.readouterr()
    assert run("--device", "cpu", "--num_workers", 0, "--eval", "--finetune", tmp_path / "a/checkpoint.pth", "--ffn", "gkan",
               "--data-path", data) == 0
    assert "phi2.coefficients  x4" in capsys.readouterr().out


def test_what_contradicts(mlp_run, data, tmp_path, capsys):
    common = ("--data-path", data, "--device", "cpu", "--num_workers", 0, "--batch-size", 16)

    def refused(*words) -> str:
        assert run(*words, *common) == 2
        return capsys.readouterr().err
    assert "--ffn kat contradicts --model test_vit_GKAN: name one of them" in refused("--model", "test_vit_GKAN", "--ffn", "kat")
    assert "--model test_vit_KAT (--ffn kat) contradicts the checkpoint, which has test_vit" in refused(
        "--eval", "--resume", mlp_run, "--ffn", "kat")
    assert "resnet18 has no MLP of timm.layers with linear maps" in refused("--model", "resnet18", "--ffn", "gkan")
    assert "--model no_such_model is unknown" in refused("--model", "no_such_model", "--ffn", "gkan")
    assert "--model test_vit.nosuch is unknown (its tags: test_vit.r160_in1k)" in refused("--model", "test_vit.nosuch")
    assert "test_coatnet has no MLP of timm.layers with linear maps (ConvMlp are left as they are)" in refused(
        "--model", "test_coatnet", "--ffn", "gkan")
    assert "stages.0.blocks.0.mlp (24 x 96): the activation GELUTanh() is not one of identity" in (
        text := refused("--model", "test_convnext", "--ffn", "gkan")) and "--kan-base" in text
    assert "--kan-groups has no effect on --model test_vit_KAN: leave it out, or choose test_vit_GKAN or test_vit_KAT" in refused(
        "--model", "test_vit", "--ffn", "kan", "--kan-groups", 4, "--input-size", 32)
    assert "--ffn: 'glu' is not one of mlp, gkan, kan, ekan, kat" in refused("--ffn", "glu")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("ffn: kat\n")
    assert "ffn" in refused("--config", recipe)


@slow
def test_formulas_and_pruning(data, tmp_path, capsys):
    trained("test_vit", "gkan", data, tmp_path / "out")
    file = str(tmp_path / "out/checkpoint.pth")
    assert symbolic.main([file, "--data-path", str(data), "--device", "cpu", "--output", str(tmp_path / "formulas")]) == 0
    assert (tmp_path / "formulas/formulas.csv").read_text().count("phi2") == 6 * 8
    capsys.readouterr()
    words = ["--what", "hidden", "--keep-parameters", "0.5", "--data-path", str(data)]
    assert prune.main([file, str(tmp_path / "p.pth"), *words]) == 2
    assert "test_vit_GKAN has no feed-forward that can be pruned" in capsys.readouterr().err


def test_errors_of_the_library():
    models_kan.register("resnet18_GKAN")
    with pytest.raises(ValueError, match="^resnet18 has no MLP of timm.layers with linear maps$"):
        timm.create_model("resnet18_GKAN")
    with pytest.raises(ValueError, match="kan_groups: no effect on test_vit_EKAN, choose test_vit_GKAN or _KAT"):
        built("test_vit_EKAN", 32, kan_groups=4)
