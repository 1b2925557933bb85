"""Flags, recipes, value checks, and what a checkpoint fills in."""
import copy
import re
import subprocess
import sys
import time
from argparse import ArgumentParser, BooleanOptionalAction, Namespace

import hostile_recipes
import pytest
import timm
import torch._inductor
import yaml
from e2e import write_digits
from helpers import DEIT, ROOT, sentence
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import models_kan
from tools import common
from vision_kan import kernels
from vision_kan.checkpoints import checkpoint as checkpoint_module
from vision_kan.common.errors import UserError
from vision_kan.config import flags as flags_module
from vision_kan.config import recipes as recipes_module
from vision_kan.config import resolve as resolve_module
from vision_kan.config.checks import validate
from vision_kan.config.flags import FLAGS, GROUPS, get_args_parser
from vision_kan.config.recipes import dump_yaml
from vision_kan.config.resolve import Config, describe_sources, parse_args, resolve
from vision_kan.run import tracking


@pytest.fixture
def recipe(tmp_path):
    def write(text) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)
    return write


def parse_error(*argv: str) -> str:
    return sentence(parse_args, list(argv))


def check_error(*argv: str, world_size: int = 1) -> str:
    return sentence(lambda: validate(parse_args(list(argv)).args, world_size))


# ---------------------------------------------------------------- DeiT's flags
def test_deit_flags_frozen():
    assert len(DEIT) == 71
    actions = {action.dest: action for action in get_args_parser()._actions}
    for dest, deit in DEIT.items():
        action = actions[dest]
        assert set(deit["options"]) <= set(action.option_strings), dest
        assert action.default == FLAGS[dest].default, dest
        assert FLAGS[dest].deit or action.default == deit["default"], dest
        assert getattr(action.type, "__name__", None) == deit["type"], dest
        assert action.nargs == ("+" if dest == "input_size" else deit["nargs"]), dest        # height and width, too
        choices = action.choices and list(action.choices)
        assert choices == deit["choices"] or dest == "data_set" and choices[:len(deit["choices"])] == deit["choices"], dest
    assert {dest for dest, flag in FLAGS.items() if not flag.ours} == DEIT.keys()


def test_changed_defaults_tell_deits_value_and_a_reason():
    changed = {dest: flag for dest, flag in FLAGS.items() if flag.deit}
    assert changed.keys() == {"model", "data_path", "device"}
    for dest, flag in changed.items():
        theirs, why = flag.deit
        assert theirs == DEIT[dest]["default"] or dest == "data_path"
        assert theirs != flag.default and len(why) > 10


def test_every_flag_has_a_scope_and_a_help_text():
    actions = get_args_parser()._actions
    assert [a.dest for a in actions] == list(FLAGS)
    assert sum(len(group.flags) for group in GROUPS) == len(FLAGS)      # none twice
    assert {flag.scope for flag in FLAGS.values()} == {"model", "data", "training", "run"}
    assert all(a.help for a in actions)


def test_deit_command_line_is_understood():
    line = ("--model deit_small_patch16_224_KAN --batch-size 256 --data-path /d --output_dir /o "
            "--num_workers 4 --no-model-ema --no-repeated-aug --opt-betas 0.9 0.95 --dr 0.3 --dist-eval "
            "--ThreeAugment --unscale-lr")
    args = parse_args(line.split()).args
    assert (args.model, args.batch_size, args.data_path) == ("deit_small_patch16_224_KAN", 256, "/d")
    assert (args.output_dir, args.num_workers, args.opt_betas, args.decay_rate) == ("/o", 4, [0.9, 0.95], 0.3)
    assert not args.model_ema and not args.repeated_aug and args.dist_eval and args.ThreeAugment
    assert args.unscale_lr and args.lr == 5e-4


def test_both_spellings_of_every_flag():
    for action in get_args_parser()._actions:
        value = {None: ["1"], 0: [], "?": [], "+": ["1"], 2: ["1", "2"], 3: ["1", "2", "3"]}[action.nargs]
        if action.choices:
            value = [list(action.choices)[-1]]
        if action.dest == "config":
            continue
        for name in (action.dest, action.dest.replace("_", "-")):
            assert parse_args([f"--{name}", *value]).given == {action.dest: "command line"}
            if isinstance(action, BooleanOptionalAction):
                assert getattr(parse_args([f"--no-{name}"]).args, action.dest) is False


def test_a_switch_with_modes(tmp_path):
    """--compile: a switch before, and so in older recipes and checkpoints."""
    assert parse_args([]).args.compile is None and parse_args(["--no-compile"]).args.compile is None
    assert parse_args(["--compile"]).args.compile == parse_args(["--compile", "default"]).args.compile == "default"
    assert parse_args(["--compile", "--epochs", "3"]).args.compile == "default"
    assert parse_args(["--compile=reduce-overhead"]).args.compile == "reduce-overhead"
    for written, mode in (("true", "default"), ("false", None), ("max-autotune", "max-autotune"), ("", None)):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(f"compile: {written}\n")
        assert parse_args(["--config", str(recipe)]).args.compile == mode
        recipe.write_text(dump_yaml(parse_args(["--config", str(recipe)]).args))
        assert parse_args(["--config", str(recipe)]).args.compile == mode
    recipe.write_text("compile: fast\n")
    for argv in (["--compile", "fast"], ["--config", str(recipe)]):
        assert "default, reduce-overhead, max-autotune, max-autotune-no-cudagraphs" in check_error(*argv)
    assert "takes no value" in check_error("--no-compile", "default")


def test_equals_sign_and_spelling():
    assert parse_args(["--output-dir=a_b-c_d"]).args.output_dir == "a_b-c_d"


def test_values_keep_their_dashes():
    assert parse_args(["--kan-grid-range", "-3", "3.5"]).args.kan_grid_range == [-3, 3.5]
    assert parse_args(["--kan-grid-range", "-1e3", "-.5"]).args.kan_grid_range == [-1000, -0.5]
    assert parse_args(["--model", "my-model_x"]).args.model == "my-model_x"


@pytest.mark.parametrize("flag,near", [("--modle", "--model"), ("--epoch", "--epochs"), ("-lr", "--lr"),
                                       ("--batchsize=3", "--batch-size"), ("--OUTPUT_DIR", "--output_dir")])
def test_typo_names_the_nearest_flag(flag, near):
    assert parse_error(flag, "3") == f"unknown flag {flag.partition('=')[0]}: did you mean {near}?"


def test_no_abbreviations():
    assert "unknown flag --data-pa" in parse_error("--data-pa", "x")


@pytest.mark.parametrize("argv,words", [
    (["--lr", "fast"], ["--lr", "fast"]), (["--batch-size", "2.5"], ["--batch-size", "2.5"]),
    (["--lr"], ["--lr"]), (["train"], ["train"]), (["--kan-grid-range", "1"], ["--kan-grid-range", "2"]),
    (["--data-set", "CIFAR100"], ["--data-set", "CIFAR100", "CIFAR10?"]),
])
def test_bad_command_line(argv, words):
    text = parse_error(*argv)
    assert all(word in text for word in words), text


def test_the_last_of_two_switches_counts():
    assert parse_args(["--bce-loss", "--no-bce-loss"]).args.bce_loss is False


def test_model_options_default_to_the_models_own():
    args = parse_args([]).args
    assert all(getattr(args, dest) is None for dest, flag in FLAGS.items() if flag.scope == "model" and dest != "model")


def test_parser_can_be_a_parent():
    child = ArgumentParser(parents=[get_args_parser()])
    assert child.parse_args(["--batch-size", "3"]).batch_size == 3


def test_help_shows_defaults_that_say_something(capsys):
    with pytest.raises(SystemExit) as e:
        parse_args(["--help"])
    out = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert e.value.code == 0
    assert "(default: 64)" in out and "SUPPRESS" not in out and "default: None" not in out
    assert out.count("(default: True)") == sum(a.default is True for a in get_args_parser()._actions)


def test_the_defaults_of_help_are_the_parsers():
    """Typed as they are shown, they are the default; one that is not shown is nothing: none, off or empty."""
    parser = get_args_parser()
    formatter = parser._get_formatter()
    for action in parser._actions:
        text = " ".join(formatter._expand_help(action).split())
        shown = re.findall(r"\(default: (.*?)\)$", text)
        assert text.count("(default:") == len(shown) == (action.default not in (None, "") and action.default is not False)
        if action.default is True:
            assert shown == ["True"]
        elif shown:
            assert getattr(parse_args([action.option_strings[0], *shown[0].split()]).args, action.dest) == action.default
        if type(action.default) in (int, float) and action.default == 0 and action.dest not in ("seed", "start_epoch"):
            assert re.search("; 0: (off|none|never)", text), text       # it stands for something else


def test_help_says_what_is_taken():
    actions = {action.dest: " ".join(action.help.split()) for action in get_args_parser()._actions}
    for dest in ("finetune", "resume", "teacher_path"):
        assert "a file, a folder, a URL" in actions[dest] and "hf-hub:OWNER/NAME" in actions[dest]
    assert "timm" in actions["model"] and "timm" in actions["finetune"] and "cores" in actions["num_workers"]


def test_reads_the_process_arguments_when_none_are_given(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main.py", "--num-workers", "3"])
    parsed = parse_args()
    assert parsed.args.num_workers == 3 and parsed.given == {"num_workers": "command line"}


# ---------------------------------------------------------------- what needs no torch
def test_the_flags_need_no_torch():
    """--help, a mistyped flag and a wrong value must not wait for it."""
    script = ("import sys\nimport vision_kan.config.flags, vision_kan.config.recipes\n"
              "from vision_kan.config.checks import check_flags\nfrom vision_kan.config.resolve import parse_args\n"
              "check_flags(parse_args(['--config', 'recipes/quickstart_gkan.yaml']).args)\n"
              "print([name for name in ('torch', 'timm', 'numpy') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_names_that_stand_in_the_table_and_elsewhere():
    assert flags_module.KAN_BACKENDS == list(kernels.BACKENDS) and flags_module.KAN_BASES == list(kernels.BASES)
    assert flags_module.KAN_FUNCTIONS == list(kernels.FUNCTIONS)
    assert set(flags_module.FFN_SUFFIXES.values()) == set(models_kan.FEED_FORWARDS)
    assert flags_module.IMAGENET_MEAN == timm.data.IMAGENET_DEFAULT_MEAN
    assert flags_module.IMAGENET_STD == timm.data.IMAGENET_DEFAULT_STD
    assert flags_module.TRACKERS == list(tracking.SERVICES) and common.WEIGHTS == checkpoint_module.WEIGHTS
    assert set(flags_module.COMPILE_MODES) <= torch._inductor.list_mode_options().keys()
    graphs = {mode for mode in flags_module.COMPILE_MODES if torch._inductor.list_mode_options(mode).get("triton.cudagraphs")}
    assert set(flags_module.OWN_GRAPHS) == graphs


# ---------------------------------------------------------------- recipes
def test_precedence(recipe):
    file = recipe("epochs: 7\nbatch-size: 32\nbce_loss: true\n")
    parsed = parse_args(["--config", file, "--batch-size", "8", "--no-bce-loss"])
    assert (parsed.args.epochs, parsed.args.batch_size, parsed.args.bce_loss) == (7, 8, False)
    assert parsed.args.lr == 5e-4
    assert parsed.given == {"epochs": f"recipe {file}", "batch_size": "command line",
                            "bce_loss": "command line", "config": "command line"}


def test_a_flag_given_with_its_default_counts_as_given(recipe):
    parsed = parse_args(["--config", recipe("epochs: 7"), "--epochs", "300"])
    assert parsed.args.epochs == 300 and parsed.given["epochs"] == "command line"


@pytest.mark.parametrize("text", ["5e-4", "5E-4", "5.0e-4", ".5e-3", "0.0005", "+5e-4", "5.e-4"])
def test_exponents_are_numbers(recipe, text):
    assert parse_args(["--config", recipe(f"lr: {text}")]).args.lr == 5e-4


def test_whole_numbers_for_real_flags(recipe):
    lr = parse_args(["--config", recipe("lr: 1")]).args.lr
    assert lr == 1 and isinstance(lr, float)


@pytest.mark.parametrize("text,words", [
    ("modle: x", ["unknown key modle", "model"]),
    ("batch_sise: 3", ["unknown key batch_sise", "batch_size"]),
    ("--batch-size: 3", ["unknown key --batch-size", "batch_size"]),
    ("no_model_ema: true", ["unknown key no_model_ema", "model_ema"]),
    ("3: 4", ["unknown key 3"]),
    ("batch_size: true", ["batch_size", "whole number", "true"]),
    ("batch_size: 3.0", ["batch_size", "whole number", "3.0"]),
    ("batch_size: '3'", ["batch_size", "whole number", "text '3'"]),
    ("epochs: 1e2", ["epochs", "whole number"]),
    ("lr: '5e-4'", ["lr", "must be a number", "'5e-4'"]),
    ("lr: fast", ["lr", "must be a number", "fast"]),
    ("lr: false", ["lr", "must be a number", "false"]),
    ("lr: [1]", ["lr", "must be a number", "list"]),
    (f"lr: 1{'0' * 400}", ["lr", "ordinary size"]),
    ("lr:", ["lr", "no value"]),
    ("bce_loss: 1", ["bce_loss", "true or false", "1"]),
    ("model: no", ["model", "text", "quotes"]),
    ("finetune: 5", ["finetune", "text", "5"]),
    ("output_dir: 2024-05-25", ["output_dir", "text", "quotes"]),
    ("data_set: CIFAR100", ["data_set", "CIFAR100", "did you mean CIFAR10?"]),
    ("opt_betas: 0.9", ["opt_betas", "list", "0.9"]),
    ("opt_betas: []", ["opt_betas", "list"]),
    ("opt_betas: [0.9, x]", ["opt_betas", "number", "'x'"]),
    ("kan_grid_range: [1]", ["kan_grid_range", "list of two"]),
    ("kan_grid_range: [1, 2, 3]", ["kan_grid_range", "list of two"]),
    ("epochs: 3\nepochs: 4", ["line 2", "epochs appears twice"]),
    ("batch-size: 3\nbatch_size: 4", ["line 2", "batch_size appears twice"]),
    ("config: other.yaml", ["config", "command line"]),
    ("list-models: true", ["list-models", "command line"]),
    ("- epochs", ["list"]), ("epochs", ["the text 'epochs'"]), ("", ["empty"]), ("3", ["the number 3"]),
    ("epochs: [", ["line", "plain YAML"]), ("a: b: c", ["line 1", "plain YAML"]),
    ("a: 1\n--- \nb: 1", ["plain YAML"]), ("? [a, b]\n: 3", ["plain YAML"]),
    (b"\xff\xfe\x00\x01\x02", ["plain YAML"]), (b"\x89PNG\r\n\x1a\n", ["plain YAML"]),
    ("lr: " + "[" * 5000, ["plain YAML"]),
    ("epochs: 2024-99-99", ["plain YAML"]), ("epochs: " + "9" * 5000, ["plain YAML"]),
    ("? " + "[" * 5000, ["plain YAML", "nested"]), ("# " + "x" * 65536, ["64 KiB"]),
    ("base: &b {lr: 1}\n<<: *b\nlr: 2", ["line 2", "merge keys"]), ("!!set {<<: {lr: 1}}", ["merge keys"]),
    ("batch_size: 010", ["batch_size", "whole number", "text '010'"]), ("epochs: 1:30", ["epochs", "text '1:30'"]),
    ("epochs: 1_000", ["text '1_000'"]), ("seed: 0x" + "f" * 5000, ["seed", "whole number"]),
    ("epochs: !!int ''", ["plain YAML"]), ("eval: !!bool maybe", ["plain YAML"]), ("lr: !!timestamp x", ["plain YAML"]),
    ("model: &a [*a]", ["model", "text", "list"]), ('"a\\nb": 1', ["unknown key a\\nb"]),
    ("k" * 1000 + ": 1", ["unknown key kkk"]),
    ('model: "a\\0b"', ["model", "character"]), ('model: "\\ud800"', ["model", "character"]),
    ("model: " + "x " * 5000 + "\nlr: x", ["lr", "number"]), ("data_set: " + "x" * 5000, ["data_set", "xxx"]),
])
def test_bad_recipe(recipe, text, words):
    file = recipe(text)
    message = parse_error("--config", file)
    assert file in message and len(message) < 400
    assert all(word in message for word in words), message


def test_recipe_that_would_run_code(recipe, tmp_path):
    victim = tmp_path / "ran"
    message = parse_error("--config", recipe(f"model: !!python/object/apply:os.mkdir ['{victim}']"))
    assert "plain YAML" in message and not victim.exists()


def test_recipe_missing_or_unreadable(tmp_path):
    (tmp_path / "tiny_kan.yaml").write_text("epochs: 1")
    assert "tiny_kan.yaml?" in parse_error("--config", str(tmp_path / "tinykan.yaml"))
    assert "no such file" in parse_error("--config", str(tmp_path / "no/recipe.yaml"))
    assert "cannot be read" in parse_error("--config", str(tmp_path))


@pytest.mark.parametrize("kind", ["list", "map", "merge", "key"])
def test_a_few_lines_that_stand_for_a_billion_values(recipe, kind):
    started = time.monotonic()
    for text in hostile_recipes.bombs(kind):
        assert len(text) < 2000 and "--config" in parse_error("--config", recipe(text))
    assert time.monotonic() - started < 5


def test_an_endless_file_and_a_name_that_cannot_be():
    assert "64 KiB" in parse_error("--config", "/dev/zero")
    assert "--config has a character" in parse_error("--config", "a\0b")
    assert "/a\\nb" in parse_error("--config", "/nowhere/a\nb")


# ---------------------------------------------------------------- args.yaml
def test_args_yaml_round_trip(recipe):
    argv = ["--opt-betas", "0.9", "0.95", "--output-dir", "5e-4", "--kan-grid-range", "-3", "3",
            "--aa", "none",
            "--teacher-model", "yes", "--finetune", "größe: #1", "--no-model-ema", "--bce-loss",
            "--lr", "1e-20",
            "--no-kan-trainable-h", "--resume", "12:30", "--model", "null", "--data-path", "2024-05-25"]
    args = parse_args(argv).args
    text = dump_yaml(args)
    again = parse_args(["--config", recipe(text)]).args
    assert {**vars(again), "config": None} == vars(args)
    plain = yaml.safe_load(text)                    # any YAML reader understands it
    assert "config" not in plain and plain["clip_grad"] is None and plain["output_dir"] == "5e-4"


def test_args_yaml_of_defaults_passes_validation_under_torchrun(recipe):
    args = parse_args(["--config", recipe(dump_yaml(parse_args([]).args))]).args
    validate(args, world_size=8)


def test_dump_leaves_out_what_is_no_flag():
    args = Namespace(**vars(parse_args([]).args), gpu=object())
    assert "gpu" not in dump_yaml(args)


# ---------------------------------------------------------------- values
def test_defaults_are_valid():
    validate(parse_args([]).args)


@pytest.mark.parametrize("argv", [
    "--batch-size 0", "--batch-size -4", "--epochs 0", "--epochs -1", "--input-size 0", "--lr 0", "--lr -1", "--lr nan",
    "--lr inf", "--drop 1", "--drop -0.1", "--drop-path 1", "--smoothing 1", "--mixup-prob 1.1",
    "--mixup-switch-prob -1", "--model-ema-decay 1", "--clip-grad 0", "--reprob 2", "--num_workers -1",
    "--grad-accum 0", "--eval-crop-ratio 0", "--eval-crop-ratio 1.2", "--distillation-tau 0",
    "--distillation-alpha 2", "--kan-grid-points 1", "--kan-h 0", "--hdim_kan 0", "--weight-decay -1",
    "--weight-decay nan", "--opt-betas 0.9 1.0", "--opt-betas nan", "--lr-noise 1.5",
    "--lr-noise 0.1 0.2 0.3",
    "--kan-grid-range 3 3", "--kan-grid-range 3 -3", "--kan-grid-range 0 inf", "--cutmix-minmax 0.5",
    "--cutmix-minmax 0.5 0.2", "--cutmix-minmax 0.2 1.5", "--seed -1", "--start_epoch -1", "--recount 0",
    "--print-freq 0", "--layer-decay 0", "--layer-decay 1.1", "--mixup -1", "--opt-eps 0", "--momentum 1",
    "--device gpu", "--dist_url localhost:3", "--remode pixels", "--mixup-mode half", "--sched cosin",
    "--train-interpolation bicubik", "--opt adamww", "--aa rand-strong", "--aa rand-m9-q3", "--aa auto",
    "--aa rand-mx", "--aa augmix-inc1", "--warmup-epochs -1", "--min-lr -1", "--color-jitter -0.1",
    "--aa rand-n1000", "--aa rand-mstd1e9", "--aa augmix-w0", "--aa augmix-a0.0", "--aa rand-m٣",
    "--lr 2e9", "--grad-accum 2000000000", "--max-unreadable 1.5", "--max-unreadable -0.1",
    "--epochs 1000001", "--recount 1001", "--num_workers 1025", "--input-size 16385", "--eval-crop-ratio 0.01",
    "--seed 9223372036854775808", "--keep 1001", "--lr-noise-pct 0", "--cutmix-minmax 0 1e-3", "--train-interpolation lanczos",
    "--kan-grid-points 1025", "--mean 123.7 116.3 103.5", "--std 0 1 1",
    "--std 58.4 57.1 57.4", "--kan-grid-range -2e9 0", "--crop-padding 225",
    "--decay-rate 1 --sched plateau", "--decay-rate 1.1 --sched step", "--decay-rate 2 --sched multistep",
])
def test_bad_value_names_its_flag(argv):
    flag, value = argv.split()[:2]
    message = check_error(*argv.split())
    assert message.startswith(flag + " ") and (value in message or float(value) == int(float(value))), message


@pytest.mark.parametrize("argv", [
    "--epochs 1", "--drop 0.99", "--smoothing 0", "--eval-crop-ratio 1", "--eval-crop-ratio 1.15",
    "--mean 0 0 0", "--std 1 1 1", "--reprob 1", "--clip-grad 1e-3",
    "--aa none", "--aa rand-m9-n3-mstd0.5", "--aa rand-m7-p0.6-mmax20-inc0-t3aw",
    "--aa augmix-m5-w4-d2-a1.5-b1",
    "--aa v0r-mstd0.5", "--aa 3a", "--opt lookahead_adamw", "--opt AdamW", "--opt muon", "--sched plateau",
    "--train-interpolation random", "--train-interpolation lanczos --aa 3a", "--train-interpolation box --ThreeAugment",
    "--device cuda:1", "--device cpu", "--kan-grid-range -1e3 0",
    "--cutmix-minmax 0.2 0.8", "--lr-noise 0.4 0.9", "--batch-size 7 --mixup 0 --cutmix 0",
    "--opt-betas 0 0.9",
    "--lr 1e9", "--seed 9223372036854775807", "--aa augmix-a0.01", "--aa rand-m10-mstd101", "--crop-padding 224",
    "--decay-rate 2 --sched poly", "--decay-rate 1 --sched step", "--decay-rate 2",
    "--batch-size 7 --eval", "--cosub --drop-path 0 --drop 0.1",
    "--resplit", "--distillation-type hard --teacher-path x", "--world_size 1",
    "--resume c.pth --cosub --drop-path 0", "--resume c.pth --sched multistep --decay-epochs 2.5",    # an earlier run
])
def test_good_values_pass(argv):
    validate(parse_args(argv.split()).args)


@pytest.mark.parametrize("policy", [
    "rand-m9-mstd0.5-inc1", "rand-m7-p0.6-mmax20-inc0-t3aw", "augmix-m5-w4-d2-a1.5-b1", "v0r-mstd0.5", "3a",
    "original", "rand"])
def test_timm_takes_the_policies_that_we_let_through(policy):
    from timm.data import create_transform
    create_transform(32, is_training=True, auto_augment=policy)


@pytest.mark.parametrize("argv,words", [
    ("--batch-size 7", ["--batch-size 7", "even", "--mixup 0 --cutmix 0"]),
    ("--batch-size 7 --mixup 0 --cutmix 0 --cutmix-minmax 0.2 0.8", ["--batch-size 7", "even"]),
    ("--resplit --no-repeated-aug", ["--resplit", "--repeated-aug"]),
    ("--distillation-type soft", ["--distillation-type soft", "--teacher-path"]),
    ("--distillation-type soft --teacher-path t --cosub", ["--cosub", "--distillation-type"]),
    ("--cosub --drop-path 0", ["--cosub", "--drop-path"]), ("--cosub --no-train-mode", ["--cosub", "--no-train-mode"]),
    ("--sched multistep --decay-epochs 2.5", ["--decay-epochs 2.5", "whole number"]),
    ("--sched multistep --decay-epochs 0.5", ["--decay-epochs 0.5", "whole number"]),
    ("--lr-noise 0.8 0.4", ["--lr-noise 0.8 0.4", "begin before"]),
    ("--lr-noise-std 1e9", ["--lr-noise-std", "100"]),
    ("--world_size 4", ["--world_size 4", "torchrun --nproc_per_node=4"]),
    ("--distributed", ["--distributed", "torchrun --nproc_per_node=2"]),
    ("--sched cosin", ["did you mean cosine?"]), ("--opt adamww", ["did you mean adamw?"]),
])
def test_contradictions(argv, words):
    message = check_error(*argv.split())
    assert all(word in message for word in words), message


def test_launch_that_matches():
    validate(parse_args(["--distributed", "--world_size", "2"]).args, world_size=2)
    assert "--world_size 3" in check_error("--world_size", "3", world_size=2)


@pytest.mark.parametrize("flag", ["--data-path", "--output_dir", "--finetune", "--resume", "--teacher-path"])
@pytest.mark.parametrize("path,why", [("~nobody_has_this_name/x", "no such user"), ("x" * 300, "too long"),
                                      ("a/" * 3000, "too long"), ("http://[::1", "Invalid IPv6"), ("caf\udce9", "UTF-8")])
def test_a_path_that_cannot_be(flag, path, why, recipe):
    text = parse_error(flag, path)
    assert text.startswith(f"{flag} ") and why in text and len(text) < 300
    if why != "UTF-8":
        file = recipe(f"{flag.lstrip('-').replace('-', '_')}: '{path}'")
        assert f"(recipe {file})" in parse_error("--config", file)
    for possible in ("~/x y/é", f"https://host/model.pth?signature={'x' * 300}"):
        assert getattr(parse_args([flag, possible]).args, flag.lstrip("-").replace("-", "_")) == possible


# ---------------------------------------------------------------- what nobody would write
FUZZ = settings(max_examples=50, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large])


@FUZZ
@given(data=st.data())
def test_hostile_recipes(tmp_path, data):
    canary, file = tmp_path / "ran", tmp_path / "recipe.yaml"
    file.write_bytes(data.draw(hostile_recipes.recipes(str(canary))))
    hostile_recipes.outcome(["--config", str(file)], canary)


@FUZZ
@given(data=st.data())
def test_hostile_command_lines(tmp_path, capsys, data):
    canary, file = tmp_path / "ran", tmp_path / "recipe.yaml"
    file.write_bytes(data.draw(hostile_recipes.recipes(str(canary))))
    hostile_recipes.outcome(data.draw(hostile_recipes.command_lines(str(file))), canary)


def test_what_the_two_above_would_notice(tmp_path, monkeypatch):
    """A loader that runs code, another exception, a hang, a value of another type, a sentence that names nothing."""
    canary, file = tmp_path / "ran", tmp_path / "recipe.yaml"
    argv = ["--config", str(file)]
    file.write_text(f"model: !!python/object/apply:os.mkdir ['{canary}']")
    with monkeypatch.context() as patch:
        patch.setattr(recipes_module, "_Loader", yaml.UnsafeLoader)
        with pytest.raises(hostile_recipes.Violation, match="os.mkdir"):
            hostile_recipes.outcome(argv)
        assert canary.is_dir()
        with pytest.raises(hostile_recipes.Violation, match="a recipe has run code"):
            hostile_recipes.outcome([], canary)

    def nameless(path):
        raise UserError("bad value")

    wrongs = {"KeyError": {}.__getitem__, "still busy": lambda path: time.sleep(9), "is no int": lambda path: {"epochs": 1.0},
              "no ordinary number": lambda path: {"seed": 2 ** 63}, "no sentence: 'bad value'": nameless}
    monkeypatch.setattr(hostile_recipes, "validate", lambda *_: None)
    for words, load_recipe in wrongs.items():
        monkeypatch.setattr(resolve_module, "load_recipe", load_recipe)
        with pytest.raises(hostile_recipes.Violation, match=f"^{words}|^[a-z_]+ .* {words}"):
            hostile_recipes.outcome(argv, canary, seconds=0.5)


@pytest.mark.slow
@settings(FUZZ, max_examples=6)
@given(data=st.data())
def test_odd_runs(digits, tmp_path_factory, data):
    """What `validate` lets through goes through the whole program, too."""
    argv = data.draw(hostile_recipes.odd_runs(str(digits), str(tmp_path_factory.mktemp("odd") / "out")))
    hostile_recipes.run_outcome(argv)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("digits"))


# ---------------------------------------------------------------- checkpoints
OURS = {"model": "deit_tiny_patch16_224_KAN", "hdim_kan": 20, "input_size": 64, "data_set": "CIFAR",
        "eval_crop_ratio": 1.0, "epochs": 50, "lr": 0.01, "batch_size": 32, "kan_h": None, "opt_betas": None,
        "output_dir": "/theirs", "data_path": "/theirs", "device": "cuda", "num_workers": 3, "eval": True,
        "resume": "x", "finetune": "y", "teacher_path": "teacher.pth", "world_size": 8, "distributed": True,
        "nb_classes": 100, "gpu": 0}


def test_eval_takes_model_and_data_only():
    got = resolve(parse_args(["--eval"]), OURS, "eval")
    for dest in ("model", "hdim_kan", "input_size", "data_set", "eval_crop_ratio"):
        assert getattr(got.args, dest) == OURS[dest]
    assert (got.args.epochs, got.args.batch_size, got.args.lr, got.args.num_workers) == (300, 64, 5e-4, 10)
    assert got.args.output_dir == got.args.data_path == got.args.teacher_path == got.args.finetune == ""
    assert got.sources == {"eval": "command line", "model": "checkpoint", "hdim_kan": "checkpoint",
                           "input_size": "checkpoint", "data_set": "checkpoint",
                           "eval_crop_ratio": "checkpoint"}
    assert not hasattr(got.args, "nb_classes") and got.notes == ()


def test_resume_takes_all_but_places():
    got = resolve(parse_args(["--resume", "auto", "--data-path", "/d"]), OURS, "resume").args
    assert (got.epochs, got.lr, got.batch_size, got.hdim_kan) == (50, 0.01, 32, 20)
    assert got.teacher_path == "teacher.pth"
    assert (got.resume, got.data_path, got.device, got.num_workers) == ("auto", "/d", "auto", 10)
    assert not got.eval
    assert (got.output_dir, got.finetune, got.world_size, got.distributed) == ("", "", 1, False)


def test_teacher_may_have_moved_on_resume():
    got = resolve(parse_args(["--resume", "auto", "--teacher-path", "new.pth"]), OURS, "resume")
    assert got.args.teacher_path == "new.pth" and got.notes == ()


def test_widths_of_a_pruned_models_blocks(recipe):
    widths = [8, 24, 16]
    stored = {**OURS, "hdim_kan": widths}
    for purpose in ("eval", "finetune", "resume"):
        assert resolve(parse_args([]), stored, purpose).args.hdim_kan == widths
    args = parse_args(["--config", recipe("hdim_kan: [8, 24, 16]")]).args
    validate(args)
    assert args.hdim_kan == widths
    assert parse_args(["--config", recipe(dump_yaml(args))]).args.hdim_kan == widths
    for wrong in ("[8, x]", "[8, 1.5]", "[[8]]", "[]"):
        assert "hdim_kan" in parse_error("--config", recipe(f"hdim_kan: {wrong}"))
    assert "at least 1" in check_error("--config", recipe("hdim_kan: [8, 0]"))
    # on the command line it is one number
    assert "--hdim_kan: '8,24' is not a whole number" in parse_error("--hdim_kan", "8,24")
    with pytest.raises(UserError, match="--hdim_kan 8 .* contradicts the checkpoint, which has 8 24 16"):
        resolve(parse_args(["--eval", "--hdim_kan", "8"]), stored, "eval")


def test_finetune_takes_the_model_unless_another_is_named():
    small = "deit_small_patch16_224_KAN"
    got = resolve(parse_args(["--finetune", "f"]), {**OURS, "model": small}, "finetune")
    assert (got.args.model, got.args.hdim_kan) == (small, 20)
    assert (got.args.input_size, got.args.epochs, got.args.data_set) == (224, 300, "IMNET")
    same = resolve(parse_args(["--finetune", "f", "--model", OURS["model"]]), OURS, "finetune")
    assert same.args.hdim_kan == 20
    other = resolve(parse_args(["--finetune", "f", "--model", small]), OURS, "finetune")
    assert other.args.model == small and other.args.hdim_kan is None
    wider = resolve(parse_args(["--finetune", "f", "--hdim_kan", "64"]), OURS, "finetune")
    assert wider.args.hdim_kan == 64 and "--hdim_kan is 64" in wider.notes[0]


def test_finetune_goes_on_with_images_as_the_weights_know_them():
    half = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "crop_mode": "squash"}
    for argv in ([], ["--model", "deit_small_patch16_224_KAN"]):
        got = resolve(parse_args(argv), {**OURS, **half}, "finetune")
        assert {key: getattr(got.args, key) for key in half} == half and got.args.eval_crop_ratio == 1.0
    got = resolve(parse_args(["--mean", "0.4", "0.4", "0.4"]), {**OURS, **half}, "finetune")
    assert got.args.mean == [0.4] * 3 and got.args.std == [0.5] * 3 and got.notes == (
        "--mean is 0.4 0.4 0.4 (command line); the checkpoint has 0.5 0.5 0.5",)
    older = resolve(parse_args([]), OURS, "finetune").args     # written before this flag was recorded
    assert older.eval_crop_ratio == 0.875 and older.mean == parse_args([]).args.mean
    with pytest.raises(UserError, match="--std 1.0 1.0 1.0 .* contradicts the checkpoint, which has 0.5 0.5 0.5"):
        resolve(parse_args(["--std", "1", "1", "1"]), {**OURS, **half}, "resume")
    assert len(resolve(parse_args(["--std", "1", "1", "1"]), {**OURS, **half}, "eval").notes) == 1


def test_nothing_is_mutated():
    parsed, checkpoint, own = parse_args(["--resume", "x", "--epochs", "3"]), dict(OURS), {"kan_h": 0.33}
    before = copy.deepcopy((parsed, checkpoint, own))
    got = resolve(parsed, checkpoint, "resume", own)
    assert (parsed, checkpoint, own) == before and got.args is not parsed.args and got.args != parsed.args


@pytest.mark.parametrize("purpose", ["resume", "eval"])
@pytest.mark.parametrize("argv", ["--hdim_kan 192", "--model deit_small_patch16_224_KAN", "--input-size 96",
                                  "--kan-h 0.5"])
def test_contradicting_a_checkpoint(purpose, argv):
    with pytest.raises(UserError) as e:
        resolve(parse_args(argv.split()), OURS, purpose, {"kan_h": 0.33})
    flag, value = argv.split()
    theirs = {**OURS, "kan_h": 0.33}[flag.strip("-").replace("-", "_")]
    assert f"{flag} {value} (command line)" in str(e.value) and f"has {theirs}:" in str(e.value)
    assert ("--finetune" in str(e.value)) == (purpose == "resume")


def test_contradicting_recipe_is_named(recipe):
    file = recipe("lr: 0.5")
    with pytest.raises(UserError, match=re.escape(f"--lr 0.5 (recipe {file})")):
        resolve(parse_args(["--config", file]), OURS, "resume")
    resolve(parse_args(["--config", file]), OURS, "eval")


def test_agreeing_with_a_checkpoint_is_fine(recipe):
    argv = ["--config", recipe("lr: 0.01\nhdim_kan: 20"), "--kan-h", "0.33", "--data-set", "CIFAR"]
    got = resolve(parse_args(argv), OURS, "resume", {"kan_h": 0.33})
    assert got.notes == () and got.sources["lr"].startswith("recipe") and got.args.kan_h == 0.33


def test_length_and_batch_may_change_on_resume():
    got = resolve(parse_args(["--epochs", "99", "--batch-size", "16", "--grad-accum", "2"]),
                  {**OURS, "grad_accum": 1}, "resume")
    assert (got.args.epochs, got.args.batch_size, got.args.grad_accum) == (99, 16, 2)
    assert len(got.notes) == 3
    assert "--epochs is 99 (command line); the checkpoint has 50" in got.notes


def test_other_images_and_crop_are_fine_in_evaluation():
    got = resolve(parse_args(["--data-set", "FOLDER", "--eval-crop-ratio", "0.9"]), OURS, "eval")
    assert (got.args.data_set, got.args.eval_crop_ratio, len(got.notes)) == ("FOLDER", 0.9, 2)
    with pytest.raises(UserError, match="--data-set FOLDER"):
        resolve(parse_args(["--data-set", "FOLDER"]), OURS, "resume")


def test_nonsense_in_a_foreign_checkpoint_is_noted_and_ignored():
    foreign = {"data_set": "SVHN", "lr": "fast", "input_size": True, "opt_betas": [0.9, 0.95],
               "weird": object(), "device": 5, "kan_grid_range": (-2, 2), "epochs": None}
    got = resolve(parse_args([]), foreign, "resume")
    assert (got.args.data_set, got.args.lr, got.args.input_size, got.args.epochs) == ("IMNET", 5e-4, 224, 300)
    assert got.args.opt_betas == [0.9, 0.95] and got.args.kan_grid_range == [-2, 2]
    assert len(got.notes) == 4 and any("data_set" in n and "SVHN" in n for n in got.notes)


def test_a_namespace_is_taken_as_well():
    assert resolve(parse_args([]), Namespace(**OURS), "eval").args.hdim_kan == 20


def test_released_vision_kan_args():
    released = {"model": "deit_tiny_patch16_224_KAN", "input_size": 64, "eval_crop_ratio": 1.0,
                "hdim_kan": 192, "train_interpolation": "bicubic", "nb_classes": 100,
                "data_set": "IMNET", "gpu": 0}
    got = resolve(parse_args(["--eval", "--resume", "f"]), released, "eval")
    assert (got.args.input_size, got.args.eval_crop_ratio, got.args.hdim_kan) == (64, 1.0, 192)


def test_describe_sources(recipe):
    file = recipe("epochs: 7\nbatch_size: 64")
    got = resolve(parse_args(["--config", file, "--seed", "3"]), {"model": "m", "kan_grid_range": [-2, 2]}, "eval")
    assert sorted(describe_sources(got).splitlines()) == [
        "from the checkpoint: kan_grid_range -2.0 2.0, model m",
        f"from the recipe {file}: epochs 7"]
    assert describe_sources(parse_args(["--seed", "3"])) == ""
    noted = resolve(parse_args(["--epochs", "9"]), OURS, "resume")
    assert describe_sources(noted).endswith("--epochs is 9 (command line); the checkpoint has 50")
    assert "opt_betas" not in describe_sources(noted)


def test_config_is_frozen():
    parsed = parse_args([])
    assert isinstance(parsed, Config)
    with pytest.raises(AttributeError):
        parsed.args = None


# ---------------------------------------------------------------- the input size
@pytest.mark.parametrize("words, size", [("64", 64), ("64 64", 64), ("32 48", [32, 48])])
def test_the_input_size_is_one_number_or_height_and_width(words, size, recipe):
    args = parse_args(["--input-size", *words.split()]).args
    assert args.input_size == size
    for text in (f"input_size: [{words.replace(' ', ', ')}]", dump_yaml(args)):
        assert parse_args(["--config", recipe(text)]).args.input_size == size
    for stored in (size, list(map(int, words.split()))):
        assert resolve(parse_args([]), {"input_size": stored}, purpose="eval").args.input_size == size
    resolve(parse_args(["--input-size", *words.split()]), {"input_size": size}, purpose="resume")


def test_bad_input_sizes(recipe):
    with pytest.raises(UserError, match=r"--input-size must be a whole number, or two \(height and width\), not the list"):
        parse_args(["--input-size", "32", "48", "64"])
    for text in ("[32, 48, 64]", "[]", "[32, x]", "true", "[32, 48.5]"):
        with pytest.raises(UserError, match="input_size must be a whole number"):
            parse_args(["--config", recipe(f"input_size: {text}")])
    assert check_error("--input-size", "0", "48") == "--input-size 0 48 must be from 1 to 4096"
    assert "--input-size 4 48" in check_error("--input-size", "4", "48", "--cutmix-minmax", "0", "0.2")
    assert "at most --input-size 48 8" in check_error("--input-size", "48", "8", "--crop-padding", "9")
    with pytest.raises(UserError, match="--input-size 32 48 .* contradicts the checkpoint, which has 48 32"):
        resolve(parse_args(["--input-size", "32", "48"]), {"input_size": [48, 32]}, purpose="resume")
