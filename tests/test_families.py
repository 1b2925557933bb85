"""The families of timm's models: what is trained can be gone on with and evaluated, whatever the parameters are called."""
import pytest
import timm
from e2e import differences, evaluation, left, run, write_digits
from timm.models import register_model

# A family's smallest model, and the side of its images where it takes another than its own.
SMALLEST: dict[str, tuple[str, int | None]] = {
    "byoanet": ("eca_halonext26ts", None),
    "byobnet": ("test_byobnet", None),
    "cait": ("cait_xxs24_224", 32),
    "coat": ("coat_tiny", None),
    "convit": ("convit_tiny", None),
    "convmixer": ("convmixer_768_32", None),
    "convnext": ("test_convnext", None),
    "cpubone": ("cpubone_nano", None),
    "crossvit": ("crossvit_tiny_240", None),
    "csatv2": ("csatv2", None),
    "cspnet": ("cs3darknet_focus_s", None),
    "cspnext": ("cspnext_tiny", None),
    "davit": ("davit_tiny", None),
    "deepseek_vit": ("deepseek_vit_412m", None),
    "deit": ("deit_tiny_patch16_224", 32),
    "densenet": ("densenet121", None),
    "dla": ("dla34", None),
    "dpn": ("dpn48b", None),
    "edgenext": ("edgenext_xx_small", None),
    "efficientformer": ("efficientformer_l1", None),
    "efficientformer_v2": ("efficientformerv2_s0", None),
    "efficientnet": ("test_efficientnet", None),
    "efficientvim": ("efficientvim_m1", None),
    "efficientvit_mit": ("efficientvit_b0", None),
    "efficientvit_msra": ("efficientvit_m0", None),
    "eva": ("vit_tiny_patch16_dinov3_qkvb", 32),
    "fasternet": ("fasternet_t0", None),
    "fastvit": ("fastvit_s12", None),
    "focalnet": ("focalnet_tiny_srf", None),
    "gcvit": ("gcvit_xxtiny", None),
    "gemma4_vit": ("gemma4_vit_167m", None),
    "ghostnet": ("ghostnet_050", None),
    "hardcorenas": ("hardcorenas_b", None),
    "hgnet": ("hgnetv2_b0", None),
    "hiera": ("hiera_tiny_224", None),
    "hieradet_sam2": ("sam2_hiera_tiny", None),
    "hrnet": ("hrnet_w18_small", None),
    "iformer": ("iformer_s", None),
    "inception_next": ("inception_next_atto", None),
    "inception_resnet_v2": ("inception_resnet_v2", None),
    "inception_v3": ("inception_v3", None),
    "inception_v4": ("inception_v4", None),
    "lcnetv2": ("lcnetv2_small", None),
    "levit": ("levit_384_s8", None),
    "lowformer": ("lowformer_b0", None),
    "mambaout": ("test_mambaout", None),
    "maxxvit": ("test_coatnet", None),
    "metaformer": ("caformer_s18", None),
    "mlp_mixer": ("mixer_s16_224", None),
    "mobilenetv3": ("mobilenetv3_small_050", None),
    "mobilenetv5": ("mobilenetv5_base", None),
    "mobilevit": ("mobilevit_xxs", None),
    "mvitv2": ("mvitv2_tiny", None),
    "naflexvit": ("naflexvit_base_patch16_siglip", None),
    "nasnet": ("nasnetalarge", None),
    "nest": ("nest_tiny", None),
    "nextvit": ("nextvit_small", None),
    "nfnet": ("test_nfnet", None),
    "pit": ("pit_xs_224", None),
    "pnasnet": ("pnasnet5large", None),
    "pvt_v2": ("pvt_v2_b0", None),
    "qwen3_vit": ("qwen3_vit_88m", None),
    "rdnet": ("rdnet_tiny", None),
    "regnet": ("regnetx_002", None),
    "repghost": ("repghostnet_050", None),
    "repvit": ("repvit_m1", None),
    "res2net": ("res2net50_26w_4s", None),
    "resnest": ("resnest14d", None),
    "resnet": ("test_resnet", None),
    "resnetv2": ("resnetv2_18", None),
    "rexnet": ("rexnet_100", None),
    "selecsls": ("selecsls42", None),
    "senet": ("legacy_seresnet18", None),
    "sequencer": ("sequencer2d_s", None),
    "shvit": ("shvit_s1", None),
    "sknet": ("skresnet18", None),
    "starnet": ("starnet_s050", None),
    "swiftformer": ("swiftformer_xs", None),
    "swin_transformer": ("swin_tiny_patch4_window7_224", None),
    "swin_transformer_v2": ("swinv2_tiny_window16_256", None),
    "swin_transformer_v2_cr": ("swinv2_cr_tiny_224", None),
    "tiny_vit": ("tiny_vit_5m_224", None),
    "tnt": ("tnt_s_legacy_patch16_224", None),
    "tresnet": ("tresnet_m", None),
    "twins": ("twins_svt_small", None),
    "vgg": ("vgg11_bn", None),
    "visformer": ("visformer_tiny", None),
    "vision_transformer": ("test_vit", 32),
    "vision_transformer_hybrid": ("vit_tiny_r_s16_p8_224", None),
    "vision_transformer_relpos": ("test_vit_relpos", None),
    "vision_transformer_sam": ("samvit_base_patch16_224", None),
    "vitamin": ("vitamin_small_224", None),
    "volo": ("volo_d1_224", None),
    "vovnet": ("ese_vovnet19b_slim_dw", None),
    "xception": ("legacy_xception", None),
    "xception_aligned": ("xception41p", None),
    "xcit": ("xcit_nano_12_p8_224", None),
}
# Those whose smallest is larger than a test should be: what makes them smaller.
LARGE = {
    "beit": ("beit_base_patch16_224", dict(depth=2, embed_dim=48, num_heads=3)),
}
FAST = ("beit", "cait", "eva")
slow = pytest.mark.slow


def small(family: str) -> str:
    """The name of a small model of it, which is registered where timm has none."""
    if family not in LARGE:
        return SMALLEST[family][0]
    name, kwargs = LARGE[family]
    own = f"small_{name}"
    if not timm.is_model(own):
        def entry(pretrained=False, **more):
            return timm.create_model(name, **{**kwargs, **more})

        entry.__name__, entry.__module__ = own, __name__
        register_model(entry)
    return own


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("digits"), train=4, val=2, classes=2)


@pytest.mark.parametrize("family", [family if family in FAST else pytest.param(family, marks=slow)
                                    for family in sorted({*SMALLEST, *LARGE})])
def test_a_family_resumes_and_is_evaluated(family, data, tmp_path, capsys):
    name, side = small(family), SMALLEST.get(family, (None, 32))[1]
    own = ("--data-path", data, "--device", "cpu", "--num_workers", 0)
    words = (*own, "--model", name, "--batch-size", 4, "--warmup-epochs", 0, "--no-repeated-aug", "--no-model-ema",
             "--opt", "sgd", "--lr", 0.01, *(("--input-size", side) if side else ()))
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


def test_every_family_is_here():
    families = {timm.models.model_entrypoint(name).__module__.rpartition(".")[2] for name in timm.list_models()
                if timm.models.model_entrypoint(name).__module__.startswith("timm.models.")}
    assert families == {*SMALLEST, *LARGE}
