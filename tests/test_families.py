"""The families of timm's models: what is trained can be resumed and evaluated, whatever the names of the parameters."""
import shutil
from typing import Any

import pytest
import timm
from e2e import evaluation, left, run, write_digits
from helpers import differences
from timm.models import register_model

# A family's smallest model, and the smallest side of its images that it takes.
SMALLEST = {
    "byoanet": ("eca_halonext26ts", 256),
    "byobnet": ("test_byobnet", 32),
    "cait": ("cait_xxs24_224", 32),
    "coat": ("coat_tiny", 32),
    "convit": ("convit_tiny", 32),
    "convmixer": ("convmixer_768_32", 32),
    "convnext": ("test_convnext", 32),
    "cpubone": ("cpubone_nano", 32),
    "crossvit": ("crossvit_tiny_240", 240),
    "csatv2": ("csatv2", 64),
    "cspnet": ("cs3darknet_focus_s", 32),
    "cspnext": ("cspnext_tiny", 32),
    "davit": ("davit_tiny", 32),
    "deit": ("deit_tiny_patch16_224", 32),
    "densenet": ("densenet121", 64),
    "dla": ("dla34", 64),
    "dpn": ("dpn48b", 64),
    "edgenext": ("edgenext_xx_small", 64),
    "efficientformer": ("efficientformer_l1", 224),
    "efficientformer_v2": ("efficientformerv2_s0", 32),
    "efficientnet": ("test_efficientnet", 64),
    "efficientvim": ("efficientvim_m1", 64),
    "efficientvit_mit": ("efficientvit_b0", 64),
    "efficientvit_msra": ("efficientvit_m0", 32),
    "eva": ("vit_tiny_patch16_dinov3_qkvb", 32),
    "fasternet": ("fasternet_t0", 64),
    "fastvit": ("fastvit_s12", 64),
    "focalnet": ("focalnet_tiny_srf", 64),
    "gcvit": ("gcvit_xxtiny", 32),
    "ghostnet": ("ghostnet_050", 64),
    "hardcorenas": ("hardcorenas_b", 64),
    "hgnet": ("hgnetv2_b0", 64),
    "hiera": ("hiera_tiny_224", 32),
    "hieradet_sam2": ("sam2_hiera_tiny", 64),
    "hrnet": ("hrnet_w18_small", 64),
    "iformer": ("iformer_s", 64),
    "inception_next": ("inception_next_atto", 64),
    "inception_resnet_v2": ("inception_resnet_v2", 96),
    "inception_v3": ("inception_v3", 96),
    "inception_v4": ("inception_v4", 96),
    "lcnetv2": ("lcnetv2_small", 64),
    "levit": ("levit_128s", 32),
    "lowformer": ("lowformer_b0", 64),
    "mambaout": ("test_mambaout", 64),
    "maxxvit": ("test_coatnet", 32),
    "metaformer": ("caformer_s18", 64),
    "mlp_mixer": ("mixer_s16_224", 32),
    "mobilenetv3": ("mobilenetv3_small_050", 64),
    "mobilevit": ("mobilevit_xxs", 64),
    "mvitv2": ("mvitv2_tiny", 32),
    "nest": ("nest_tiny", 32),
    "nextvit": ("nextvit_small", 64),
    "nfnet": ("test_nfnet", 64),
    "pit": ("pit_ti_224", 32),
    "pnasnet": ("pnasnet5large", 64),
    "pvt_v2": ("pvt_v2_b0", 64),
    "rdnet": ("rdnet_tiny", 64),
    "regnet": ("regnetx_002", 64),
    "repghost": ("repghostnet_050", 64),
    "repvit": ("repvit_m1", 64),
    "res2net": ("res2net50_26w_4s", 64),
    "resnest": ("resnest14d", 64),
    "resnet": ("test_resnet", 64),
    "resnetv2": ("resnetv2_18", 64),
    "rexnet": ("rexnet_100", 64),
    "selecsls": ("selecsls42", 64),
    "senet": ("legacy_seresnet18", 64),
    "sequencer": ("sequencer2d_s", 32),
    "shvit": ("shvit_s1", 64),
    "sknet": ("skresnet18", 64),
    "starnet": ("starnet_s050", 64),
    "swiftformer": ("swiftformer_xs", 32),
    "swin_transformer": ("swin_tiny_patch4_window7_224", 32),
    "swin_transformer_v2": ("swinv2_tiny_window16_256", 32),
    "swin_transformer_v2_cr": ("swinv2_cr_tiny_224", 32),
    "tiny_vit": ("tiny_vit_5m_224", 64),
    "tnt": ("tnt_s_legacy_patch16_224", 32),
    "tresnet": ("tresnet_m", 64),
    "twins": ("twins_svt_small", 32),
    "visformer": ("visformer_tiny", 32),
    "vision_transformer": ("test_vit", 32),
    "vision_transformer_hybrid": ("vit_tiny_r_s16_p8_224", 32),
    "vision_transformer_relpos": ("test_vit_relpos", 32),
    "vitamin": ("vitamin_small_224", 32),
    "volo": ("volo_d1_224", 32),
    "vovnet": ("ese_vovnet19b_slim_dw", 64),
    "xception": ("legacy_xception", 64),
    "xception_aligned": ("xception41p", 64),
    "xcit": ("xcit_nano_12_p8_224", 32),
}
# Those whose smallest is larger than a test should be: what makes them smaller.
LARGE: dict[str, tuple[str, int, dict[str, Any]]] = {
    "beit": ("beit_base_patch16_224", 32, dict(depth=2, embed_dim=48, num_heads=3)),
    "deepseek_vit": ("deepseek_vit_412m", 28, dict(depth=2, embed_dim=64, num_heads=4)),
    "gemma4_vit": ("gemma4_vit_167m", 32, dict(depth=2, embed_dim=48, num_heads=3, head_dim=16, intermediate_size=96)),
    "mobilenetv5": ("mobilenetv5_base", 64, dict(channel_multiplier=0.25)),
    "naflexvit": ("naflexvit_base_patch16_siglip", 32, dict(depth=2, embed_dim=48, num_heads=3)),
    "nasnet": ("nasnetalarge", 64, dict(stem_size=16, num_features=384)),
    "qwen3_vit": ("qwen3_vit_88m", 32, dict(depth=2, embed_dim=48, num_heads=3)),
    "vgg": ("vgg11_bn", 64, dict(mlp_ratio=1 / 64)),
    "vision_transformer_sam": ("samvit_base_patch16_224", 32, dict(depth=2, embed_dim=48, num_heads=3, global_attn_indexes=(1,))),
}
FAST = ("beit",)
slow = pytest.mark.slow


def small(family: str) -> tuple[str, int]:
    """The name of a small model of it, which is registered where timm has none, and the side of its images."""
    if family not in LARGE:
        return SMALLEST[family]
    name, side, kwargs = LARGE[family]
    own = f"small_{name}"
    if not timm.is_model(own):
        def entry(pretrained=False, **more):
            return timm.create_model(name, **{**kwargs, **more})

        entry.__name__, entry.__module__ = own, __name__
        register_model(entry)
    return own, side


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("digits"), train=4, val=2, classes=2)


@pytest.mark.parametrize("family", [family if family in FAST else pytest.param(family, marks=slow)
                                    for family in sorted({*SMALLEST, *LARGE})])
def test_a_family_resumes_and_is_evaluated(family, data, tmp_path, capsys):
    name, side = small(family)
    own = ("--data-path", data, "--device", "cpu", "--num_workers", 0)
    words = (*own, "--model", name, "--batch-size", 4, "--warmup-epochs", 0, "--no-repeated-aug", "--no-model-ema",
             "--opt", "sgd", "--lr", 0.01, "--input-size", side)
    assert run(*words, "--epochs", 2, "--output_dir", tmp_path / "whole") == 0
    trained = evaluation(capsys.readouterr().out.rpartition("best top-1")[0])
    (tmp_path / "again").mkdir()
    (tmp_path / "whole/checkpoint_previous.pth").rename(tmp_path / "again/checkpoint.pth")
    assert run(*words, "--epochs", 2, "--output_dir", tmp_path / "again", "--resume", "auto") == 0
    whole, again = (left(tmp_path / folder)["files"]["checkpoint.pth"] for folder in ("whole", "again"))
    assert not differences(whole, again)
    capsys.readouterr()
    assert run("--eval", "--resume", tmp_path / "again/checkpoint.pth", *own) == 0
    assert evaluation(capsys.readouterr().out) == trained
    shutil.rmtree(tmp_path)     # of all families together, gigabytes


def test_every_family_is_here():
    families = {timm.models.model_entrypoint(name).__module__.rpartition(".")[2] for name in timm.list_models()
                if timm.models.model_entrypoint(name).__module__.startswith("timm.models.")}
    assert families == {*SMALLEST, *LARGE}
