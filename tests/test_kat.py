"""KAT: its rationals against their formula, its beginnings, its files, and what it takes over from an MLP."""
import numpy as np
import pytest
import timm
import torch
from e2e import QUICK, run, write_digits
from helpers import KAT, RELEASED_KAT, TWIN, differences, every, needs_released_kat, sentence
from models import nano, spread, trained
from paths import BASES_BY_HAND, error, gradients
from safetensors.torch import save_file
from timm.layers import Mlp
from torch import nn

from models_kan import ModelSpec
from tools import convert, inspect_kan, predict, symbolic
from vision_kan.checkpoints.checkpoint import Checkpoint
from vision_kan.config.resolve import parse_args
from vision_kan.layers.feed_forward import beginnings
from vision_kan.layers.kat import BEGINS, GroupRational
from vision_kan.layers.kat import KAT as FeedForward
from vision_kan.models import weight_init
from vision_kan.models.finetune import load_finetune
from vision_kan.models.infer import infer_model, load_exactly
from vision_kan.run.starting import effective_config, read_start

FITS = {"identity": 0.0, "gelu": 3.3e-3, "silu": 8e-7}       # largest error on [-3, 3]
HERE = ("--device", "cpu", "--num_workers", "0")


def rational_of(channels=12, seed=0, dtype=torch.float64, **kwargs):
    """Every parameter away from its beginning, denominators of both signs."""
    layer, generator = GroupRational(channels, **{"groups": 3, **kwargs}), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    assert layer.weight_denominator.min() < 0 < layer.weight_denominator.max()
    return layer.to(dtype)


def by_hand(layer, u):
    """The formula, one channel at a time."""
    each, columns = layer.channels // len(layer.weight_denominator), []
    for channel in range(layer.channels):
        x, b = u[..., channel], layer.weight_denominator[channel // each]
        p = sum(layer.weight_numerator[0, k] * x ** k for k in range(6))
        columns.append(p / (1 + sum(b[k - 1].abs() * x.abs() ** k for k in range(1, 5))))
    return torch.stack(columns, -1)


# ---------------------------------------------------------------- the layer
@pytest.mark.parametrize("groups", [1, 3, 0])
def test_a_rational_is_its_formula(groups):
    layer, u, dy = rational_of(groups=groups), torch.randn(7, 5, 12, dtype=torch.float64) * 2, torch.randn(7, 5, 12).double()
    u.requires_grad_()
    leaves = [u, layer.weight_numerator, layer.weight_denominator]
    assert len(layer.weight_denominator) == (groups or 12)
    want = gradients(lambda: by_hand(layer, u), leaves, dy)
    for ours, theirs in zip(gradients(lambda: layer(u), leaves, dy), want):
        assert error(ours, theirs) < 1e-12
    single = rational_of(groups=groups, dtype=torch.float32)
    assert error(single(u.detach().float()), want[0]) < 2e-6


def test_gradients_of_the_feed_forward_to_second_order():
    torch.manual_seed(0)
    kat = FeedForward(4, 6, groups=2).double()
    with torch.no_grad():
        for parameter in kat.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(kat, (x,))
    names, leaves = zip(*kat.named_parameters())

    def of_parameters(*values):
        return torch.func.functional_call(kat, dict(zip(names, values)), (x.detach(),))

    assert torch.autograd.gradcheck(of_parameters, leaves)
    assert torch.autograd.gradgradcheck(kat.act2, (torch.randn(3, 6, dtype=torch.float64, requires_grad=True),))


@pytest.mark.parametrize("base", BEGINS)
def test_beginnings_are_as_close_as_stated(base):
    assert FITS.keys() == BEGINS.keys()
    u = torch.linspace(-3, 3, 6001, dtype=torch.float64)[:, None].expand(-1, 8)
    with torch.no_grad():
        distance = (GroupRational(8, base=base).double()(u) - BASES_BY_HAND[base](u)).abs().max().item()
    assert 0.5 * FITS[base] <= distance <= 1.05 * FITS[base]


def test_what_it_refuses():
    for groups in (5, -1):
        with pytest.raises(ValueError, match=f"{groups} groups do not divide 12 channels"):
            GroupRational(12, groups=groups)
    with pytest.raises(ValueError, match="base relu is not one of identity, gelu, silu"):
        FeedForward(8, 16, base="relu")
    with pytest.raises(ValueError, match="base relu "):
        FeedForward(8, 16, act_layer=nn.ReLU)
    assert FeedForward(8, 16, act_layer=nn.SiLU).act2.base == "silu" and FeedForward(8, 16).act2.base == "gelu"
    with pytest.raises(ValueError, match="kan_h: no effect on vit_nano_patch8_32_KAT"):
        nano(KAT, kan_h=1.0)


def test_its_basis_gives_its_functions():
    layer, u = rational_of(), torch.linspace(-4, 4, 33, dtype=torch.float64)
    values = layer.basis(u) @ layer.exact_weights()[0].T                        # [33, groups]
    with torch.no_grad():
        assert error(values, layer(u[:, None].expand(-1, 12))[:, ::4]) < 1e-12
    assert error(layer.basis(u) @ layer.base_weights()[0].T, u[:, None].expand(-1, 3)) < 1e-12
    assert not layer.has_grid and not layer.takes_weights


@pytest.mark.parametrize("kwargs", [{}, {"kan_groups": 4, "kan_base": "silu", "hdim_kan": 48}, {"kan_groups": 0}])
def test_a_model_is_read_from_its_weights(kwargs):
    model = nano(KAT, depth=4, **kwargs).eval()
    spec = infer_model(model.state_dict(), {})
    assert spec.name == KAT
    assert spec.kwargs == {"img_size": 32, "num_classes": 4, "kan_groups": 8, "kan_base": "gelu", **kwargs}
    spread(model)
    other = timm.create_model(spec.name, **spec.kwargs).eval()
    load_exactly(other, model.state_dict(), "the file")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(other(images), model(images))


# ---------------------------------------------------------------- from an MLP
def test_it_takes_an_mlp_over_up_to_the_fit():
    source, model = trained(depth=2), nano(KAT, num_classes=10, depth=2, seed=1).eval()
    report = load_finetune(model, source.state_dict())
    assert not report.dropped and not report.initial
    assert {key for key in report.converted} == {key for key in model.state_dict() if ".act" in key}
    assert set(report.converted.values()) == {"begins as the MLP's activation to within 3.3e-3 on [-3, 3]"}
    assert beginnings(model, source.state_dict()) == report.converted
    mlp, kat, n = source.blocks[0].mlp, model.blocks[0].mlp, torch.randn(50, 96)
    with torch.no_grad():
        hidden = mlp.fc1(n)
        assert hidden.abs().max() < 12
        n = n[hidden.abs().amax(1) < 3]
        assert len(n) > 5
        bound = FITS["gelu"] * 1.01 * mlp.fc2.weight.abs().sum(1) + 1e-4
        assert ((kat(n) - mlp(n)).abs() <= bound).all() and not torch.equal(kat(n), mlp(n))
        images = torch.randn(4, 3, 32, 32)
        assert error(model(images), source(images)) < 0.05
    other = nano(KAT, num_classes=10, depth=2, seed=2).eval()
    spread(model)
    report = load_finetune(other, model.state_dict())
    assert not report.converted and not report.dropped and not differences(other.state_dict(), model.state_dict())


def test_another_feed_forwards_functions_are_left():
    model, group = nano(KAT, num_classes=10), nano("vit_nano_patch8_32_GKAN", num_classes=10)
    report = load_finetune(model, group.state_dict())
    assert not report.converted and {key for key in report.initial} == {key for key in model.state_dict() if ".act" in key}
    assert {key for key in report.dropped} == {key for key in group.state_dict() if ".phi" in key}


def test_convert_accepts_the_fits_error(tmp_path, capsys):
    torch.save({"model": trained(depth=2).state_dict()}, tmp_path / "mlp.pth")
    photos = write_digits(tmp_path / "photos", train=1, val=2)
    assert convert.main([str(tmp_path / "mlp.pth"), str(tmp_path / "kat.safetensors"), "--model", KAT, "--check",
                         str(photos / "val")]) == 0
    assert "the first choice is the same for 100.0%" in capsys.readouterr().out


def test_replacing_mlps_keeps_their_activation():
    from vision_kan.layers.replacement import replace_mlps
    for activation, most in ((nn.GELU, 0.02), (nn.SiLU, 1e-5)):
        torch.manual_seed(0)
        model, x = nn.Sequential(Mlp(16, 32, act_layer=activation)).eval(), torch.randn(40, 16)
        with torch.no_grad():
            before = model(x)
            assert replace_mlps(model, FeedForward) == 1 and isinstance(model[0], FeedForward)
            assert error(model(x), before) < most


# ---------------------------------------------------------------- files of the original
@pytest.fixture(scope="module")
def original():
    return Checkpoint.open(RELEASED_KAT).weights(), np.load(RELEASED_KAT.with_suffix(".npz"))


@needs_released_kat
def test_logits_of_the_original_code(original):
    weights, arrays = original
    spec = infer_model(weights, {"model": "kat_tiny_patch16_224"})
    assert spec == ModelSpec("deit_tiny_patch16_224_KAT", {"img_size": 64, "num_classes": 10, "kan_groups": 8,
                                                           "kan_base": "silu"})
    model, images = timm.create_model(spec.name, **spec.kwargs).eval(), torch.from_numpy(arrays["x"])
    load_exactly(model, weights, "the file")
    want = torch.from_numpy(arrays["model_fp64"])
    with torch.no_grad():
        assert (model(images) - want).abs().max() < 1e-4
        model.double()
        assert (model(images.double()) - want).abs().max() < 1e-9
        out = model.blocks[0].mlp(torch.from_numpy(arrays["mlp_in"]))
        assert (out - torch.from_numpy(arrays["mlp_out_fp64"])).abs().max() < 1e-9


@needs_released_kat
@pytest.mark.parametrize("kind", every(4, ["as released", "plain.pth", "plain.safetensors", "hub"]))
def test_the_originals_files_work_as_they_are(kind, original, tmp_path, capsys):
    file = RELEASED_KAT if kind == "as released" else tmp_path / kind
    if kind == "plain.pth":
        torch.save(original[0], file)
    elif kind == "plain.safetensors":
        save_file(original[0], file)
    elif kind == "hub":
        file.mkdir()
        save_file(original[0], file / "model.safetensors")
        (file / "config.json").write_text('{"architecture": "kat_tiny_patch16_224", "num_classes": 10}')
    data = write_digits(tmp_path / "data", train=2, val=1, classes=10, size=64)
    image = next(data.glob("val/*/*.png"))
    assert run("--eval", "--resume", file, "--data-path", data, *HERE) == 0
    out = capsys.readouterr().out
    assert "model deit_tiny_patch16_224_KAT" in out and "kan_base silu" in out and "(10 images)" in out
    assert predict.main([str(file), str(image), "--device", "cpu"]) == 0
    assert inspect_kan.main([str(file), str(image), "--device", "cpu", "--layer", "blocks.11", "--output",
                             str(tmp_path / "report")]) == 0
    assert "blocks.11.mlp.act2" in (tmp_path / "report/report.html").read_text()
    config = parse_args(["--finetune", str(file), "--data-path", str(data)])
    args = effective_config(config, read_start(config)).args
    assert (args.model, args.kan_base, args.kan_groups) == ("deit_tiny_patch16_224_KAT", "silu", 8)
    if kind == "plain.safetensors":
        folder = tmp_path / "run"
        words = ("--data-path", data, *HERE, "--output_dir", folder, "--batch-size", 4, "--warmup-epochs", 0)
        assert run("--finetune", file, "--input-size", 64, "--epochs", 1, *words) == 0
        assert "loaded: 200 tensors" in capsys.readouterr().out
        assert run("--resume", folder / "checkpoint.pth", "--epochs", 2, *HERE, "--data-path", data, "--output_dir", folder) == 0
        assert run("--eval", "--resume", folder / "checkpoint.pth", "--data-path", data, *HERE) == 0


# ---------------------------------------------------------------- the program
@pytest.fixture(scope="module")
def trained_kat(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kat")
    data = write_digits(folder / "data")
    assert run(*QUICK, "--model", KAT, "--data-path", data, "--epochs", 1, "--log-kan", 1, "--output_dir", folder / "run") == 0
    return data, folder / "run/checkpoint.pth"


@pytest.mark.slow
def test_its_rationals_are_trained_as_published_unless_told_otherwise(trained_kat):
    state = torch.load(trained_kat[1], weights_only=True)
    assert (state["args"]["kan_lr_mult"], state["args"]["kan_weight_decay"]) == (1.0, 0.05)
    found = {(group["kan_multiple"], group["weight_decay"]): len(group["params"])
             for group in state["optimizer"]["param_groups"] if "kan_multiple" in group}
    assert found == {(1.0, 0.05): 16}       # 4 blocks of 2 layers with numerator and denominator
    other = effective_config(parse_args(["--model", KAT, "--kan-lr-mult", "3", "--kan-weight-decay", "0"]),
                             read_start(parse_args([]))).args
    assert (other.kan_lr_mult, other.kan_weight_decay) == (3.0, 0.0)
    for name in (TWIN, "vit_nano_patch8_32_GKAN"):
        own = effective_config(parse_args(["--model", name]), read_start(parse_args([]))).args
        assert (own.kan_lr_mult, own.kan_weight_decay) == (20.0, 0.0)


@pytest.mark.slow
def test_its_report_has_no_grid(trained_kat, tmp_path):
    data, checkpoint = trained_kat
    assert inspect_kan.main([str(checkpoint), "--data-path", str(data), "--layer", "blocks.3", "--output", str(tmp_path)]) == 0
    report = (tmp_path / "report.html").read_text()
    assert "blocks.3.mlp.act2" in report and "off its grid" not in report and "whose grid is" not in report
    tags = [path for path in checkpoint.parent.rglob("events*")]
    content = b"".join(path.read_bytes() for path in tags)
    assert b"kan_distance/blocks.0.mlp.act1" in content and b"kan_off_grid" not in content


def test_formulas_cannot_replace_its_functions(trained_kat, tmp_path, capsys):
    data, checkpoint = trained_kat
    words = [str(checkpoint), *HERE, "--data-path", str(data)]
    assert symbolic.main([*words, "--replace", str(tmp_path / "t.safetensors")]) == 2
    assert "in vit_nano_patch8_32_KAT all groups share some of theirs" in capsys.readouterr().err


def test_a_base_without_a_fit_is_one_sentence(trained_kat, capsys):
    assert run(*QUICK, "--model", KAT, "--data-path", trained_kat[0], "--kan-base", "relu") == 2
    assert "base relu is not one of identity, gelu, silu, to which rationals are fitted" in capsys.readouterr().err
    from vision_kan.run.build import build_model
    for flags in (["--kan-h", "1"], ["--kan-grid-points", "5"], ["--kan-trainable-base"], ["--no-kan-input-phi"]):
        config = parse_args(["--model", KAT, *flags])
        text = sentence(build_model, ModelSpec(KAT, {"num_classes": 3, "img_size": 32}), config)
        assert f"has no effect on --model {KAT}" in text


# ---------------------------------------------------------------- --weight-init mimetic
@torch.no_grad()
def products(attention):
    """Wq^T Wk of each head [H, D, D] and Wo Wv [D, D], float64."""
    q, k, v = attention.qkv.weight.double().unflatten(0, (3, attention.num_heads, -1))
    return q.mT @ k, attention.proj.weight.double() @ v.flatten(0, 1)


@pytest.mark.parametrize("suffix", ["KAN", "GKAN", "EKAN", "KAT", "ViT"])
def test_mimetic_attention(suffix, monkeypatch):
    """Products against the matrices that they approximate, of which a head keeps the 32 largest singular values."""
    ideals, factors = [], weight_init._factors

    def recorded(*args):
        left, right = factors(*args)
        ideals.append((left @ right).double())
        return left, right

    monkeypatch.setattr(weight_init, "_factors", recorded)

    def made(seed=0):
        model = nano(f"vit_nano_patch8_32_{suffix}", seed=seed, depth=2)
        ideals.clear()
        assert weight_init.init_mimetic(model) == 2
        return model

    plain, model = nano(f"vit_nano_patch8_32_{suffix}", depth=2), made()
    wanted = iter(list(ideals))
    assert len(ideals) == 2 * 4 and not differences(made().state_dict(), model.state_dict())
    changed = {path.removeprefix(".") for path in differences(plain.state_dict(), model.state_dict())}
    assert changed == {f"blocks.{n}.attn.{part}.weight" for n in range(2) for part in ("qkv", "proj")}
    assert differences(made(1).state_dict(), model.state_dict())
    eye = torch.eye(96, dtype=torch.float64)
    for ours, theirs in zip(model.blocks, plain.blocks):
        (qk, vo), (qk_plain, vo_plain) = products(ours.attn), products(theirs.attn)
        for head, other in zip(qk, qk_plain):
            assert torch.linalg.matrix_rank(head) == 32
            ideal = next(wanted)
            assert (head - ideal).norm() < 0.9 * (other - ideal).norm()
            torch.testing.assert_close((head - ideal).norm(), torch.linalg.svdvals(ideal)[32:].norm(), rtol=1e-4, atol=1e-4)
            assert head.diagonal().mean() > 0.2 > 10 * abs(other.diagonal().mean())
        torch.testing.assert_close(vo, next(wanted), rtol=0, atol=1e-5)
        assert (vo_plain - vo).norm() > 0.3 * vo.norm()
        assert (vo + 0.4 * eye).norm() < 0.4 * 96 ** 0.5 * 1.15       # what is left is 0.4 Z
        assert vo.diagonal().mean() == pytest.approx(-0.4, abs=0.03)
        off = vo - torch.diag(vo.diagonal())
        assert off.std() == pytest.approx(0.4 / 96 ** 0.5, rel=0.1)


@pytest.mark.slow
def test_mimetic_acts_at_the_start_of_a_training_alone(tmp_path, capsys):
    data = write_digits(tmp_path / "data", train=8, val=2)
    still = (*QUICK, "--model", TWIN, "--data-path", data, "--epochs", 1, "--lr", 1e-30, "--min-lr", 0, "--warmup-lr", 0,
             "--no-model-ema")

    def attention(folder, *flags):
        assert run(*still, "--output_dir", tmp_path / folder, *flags) == 0
        return torch.load(tmp_path / folder / "checkpoint.pth", weights_only=True)["model"]["blocks.0.attn.qkv.weight"]

    plain, mimetic = attention("plain"), attention("mimetic", "--weight-init", "mimetic")
    assert mimetic[:192].std() > 2 * plain[:192].std()
    tuned = attention("tuned", "--weight-init", "mimetic", "--finetune", tmp_path / "plain/checkpoint.pth")
    assert torch.equal(tuned, plain)
    before = torch.load(tmp_path / "mimetic/checkpoint.pth", weights_only=True)["model"]
    assert run("--resume", tmp_path / "mimetic/checkpoint.pth", "--epochs", 2, "--data-path", data, *HERE, "--output_dir",
               tmp_path / "mimetic") == 0
    after = torch.load(tmp_path / "mimetic/checkpoint.pth", weights_only=True)
    assert after["epoch"] == 1 and after["args"]["weight_init"] == "mimetic"
    assert (after["model"]["blocks.0.attn.qkv.weight"] - before["blocks.0.attn.qkv.weight"]).abs().max() < 1e-3
    capsys.readouterr()
    assert run(*QUICK, "--model", "resnet10t", "--data-path", data, "--weight-init", "mimetic") == 2
    assert "--weight-init mimetic has no effect on --model resnet10t" in capsys.readouterr().err
