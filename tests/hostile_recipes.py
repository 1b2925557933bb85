"""Recipes, command lines and odd combinations of good flags that nobody would write on purpose, and what must come of them.

Strategies for hypothesis: `recipes` (bytes of a YAML file), `command_lines`, `odd_runs`. `outcome` and `run_outcome` look at
one example; `Violation` says what is wrong with it and how to see it again.
"""
import contextlib
import io
import math
import re
import shlex
import signal
import sys
import traceback
from argparse import Action, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hypothesis import strategies as st
from timm.optim import list_optimizers

from vision_kan.common.errors import UserError
from vision_kan.config.checks import validate
from vision_kan.config.flag import LARGEST
from vision_kan.config.flags import FLAGS as TABLE
from vision_kan.config.flags import get_args_parser
from vision_kan.config.parser import HeightAndWidth, on_one_line
from vision_kan.config.resolve import parse_args

ACTIONS = {action.dest: action for action in get_args_parser()._actions}
FLAGS = {dest: action for dest, action in ACTIONS.items() if not TABLE[dest].one_shot}
OPTIONS = sorted(option for action in ACTIONS.values() for option in action.option_strings)
_NAMES = {dest: flag.names for dest, flag in TABLE.items() if flag.names}
# What a run of a program may do that reading a file must not.
FORBIDDEN = {"os.system", "os.exec", "os.fork", "os.forkpty", "os.spawn", "os.posix_spawn", "os.startfile", "subprocess.Popen",
             "compile", "exec", "socket.connect", "os.remove", "os.rename", "os.mkdir", "pickle.find_class"}


class Violation(AssertionError):
    """A flag or a recipe leads neither to a run nor to a sentence."""


# ---------------------------------------------------------------- what must hold
_watched: list[str] | None = None


def _audit(event: str, args: tuple) -> None:
    if _watched is not None and event in FORBIDDEN:
        _watched.append(f"{event}{args!r}"[:200])


sys.addaudithook(_audit)        # it cannot be taken away again; outside `nothing_runs` it looks at one variable


@contextmanager
def nothing_runs() -> Iterator[None]:
    """Raises Violation if code is compiled or run, or a process started, inside."""
    global _watched
    _watched = seen = []
    try:
        yield
    finally:
        _watched = None
        if seen:
            raise Violation(f"something was run: {seen}")


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises Violation if the inside takes longer; main thread only."""
    def late(*_):
        raise Violation(f"still busy after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def outcome(argv: list[str], canary: Path | None = None, world_size: int = 1, seconds: float = 10) -> str:
    """"accepted", "refused" or "help": what the flags and the recipe come to. Raises Violation for anything else.

    canary: a file that a recipe tries to create."""
    try:
        with at_most(seconds), nothing_runs():
            parsed = parse_args(argv)
            validate(parsed.args, world_size)
    except UserError as error:
        check_sentence(str(error), argv)
        return "refused"
    except SystemExit as end:
        if end.code == 0 and {"-h", "--help"} & set(argv):
            return "help"
        raise Violation(f"exit code {end.code}: {shlex.join(argv)}") from end
    except Violation as violation:
        raise Violation(f"{violation}: {shown(argv)}") from violation
    except BaseException as error:
        raise Violation(f"{type(error).__name__}: {error}: {shown(argv)}\n{traceback.format_exc(limit=-4)}") from error
    finally:
        if canary is not None and canary.exists():
            canary.rmdir() if canary.is_dir() else canary.unlink()
            raise Violation(f"a recipe has run code: {shown(argv)}")
    check_values(parsed.args)
    return "accepted"


def shown(argv: list[str]) -> str:
    """The command line, and the bytes of its recipe."""
    text = shlex.join(argv)
    if "--config" in argv[:-1]:
        file = Path(argv[argv.index("--config") + 1])
        text += f" with {file.read_bytes()!r}" if file.is_file() else ""
    return text if len(text) < 3000 else text[:3000] + " ..."


def check_sentence(text: str, argv: list[str]) -> None:
    """One line of ordinary length that names a flag, a word of the command line or the recipe's file."""
    good = text and text.isprintable() and len(text) < 600 and "Traceback" not in text
    named = any(option in text for option in OPTIONS) or any(f"'{word}'"[:20] in text or word[:20] in text
                                                             for word in map(on_one_line, argv))
    if not (good and named):
        raise Violation(f"no sentence: {text!r}: {shown(argv)}")


def check_values(args: Namespace) -> None:
    """Every flag is there, of its own type, and every number is finite and of ordinary size."""
    for dest, action in ACTIONS.items():
        value = getattr(args, dest)
        if value is None:
            if action.default is not None:
                raise Violation(f"{dest} is None")
            continue
        if isinstance(action, HeightAndWidth):       # an oblong size alone is a list
            if isinstance(value, list) and (len(value) != 2 or value[0] == value[1]):
                raise Violation(f"{dest} {value!r} is neither one number nor two that differ")
            value = value if isinstance(value, list) else [value]
        numbers = value if action.nargs in ("+", 2, 3) else [value]
        if not isinstance(numbers, list) or not numbers:
            raise Violation(f"{dest} {value!r} is no list")
        for number in numbers:
            kind = bool if action.nargs == 0 else action.type or str
            if type(number) is not kind:
                raise Violation(f"{dest} {number!r} is no {kind.__name__}")
            if kind is float and not math.isfinite(number) or kind is int and abs(number) >= 2 ** 63:
                raise Violation(f"{dest} {number!r} is no ordinary number")
            if kind is str and ("\0" in number or number.encode("utf-8", "ignore").decode() != number):
                raise Violation(f"{dest} {number!r} can be no name of anything")


# ---------------------------------------------------------------- values
# Numbers on both sides of most limits, and far beyond them.
INTEGERS = st.one_of(st.sampled_from([0, 1, 2, 3, 7, 8, -1, -3, 10 ** 6, 10 ** 6 + 1, 2 ** 31 - 1, 2 ** 31, 2 ** 63 - 1, 2 ** 63,
                                      10 ** 30, -10 ** 30, 10 ** 400]), st.integers(-10, 300))
REALS = st.one_of(st.sampled_from([0.0, -0.0, 1.0, 0.5, 1e-9, 1 - 1e-16, 1.0000001, -1e-300, 1e-320, 1e300, -1.0, 1e9, 1e10,
                                   math.inf, -math.inf, math.nan]), st.floats(0, 1), st.floats())
NAMES = st.sampled_from(["", "none", "cpu", "cuda:0", "cuda:-1", "cpu:99999999999999999999", "meta", "xla", "auto",
                         "env://", "tcp://", "tcp://[::1", "adamw", "lookahead_adamw",
                         "lookahead_lookahead_adamw", "ADAMW", "lookahead_",
                         "rand-m9-mstd0.5-inc1", "rand-m9-n99999999999", "rand" + "-m9" * 3000, "rand-mstd" + "9" * 400,
                         "augmix-w0", "augmix-a0", "3a", "original-mstd", "cosine", "plateau", "random", "pixel", "elem",
                         "-", "--", "%s%n%x", "../../etc/passwd", "~nobody_here/x", "$(touch x)", "a\nb", "a\x1b[31mb",
                         "\u202egpj", "é", "一", "\ud800", "\udcff", "\0", "a\0b", "x" * 5000])
TEXTS = st.one_of(NAMES, st.text(max_size=20))


def _of_type(action: Action) -> st.SearchStrategy:
    """Values that the flag might take, good and bad ones, as Python's own types."""
    if action.nargs == 0:
        return st.booleans()
    one = {int: INTEGERS, float: REALS}.get(action.type, TEXTS)
    if action.choices:
        one = st.sampled_from([*action.choices, *(str(choice).swapcase() for choice in action.choices)])
    return st.lists(one, max_size=3) if action.nargs in ("+", 2, 3) else one


def _within(dest: str, action: Action) -> st.SearchStrategy:
    """Values of the flag that are refused rarely."""
    if action.nargs == 0:
        return st.booleans()
    if action.choices:
        one = st.sampled_from(list(action.choices))
        return st.lists(one, min_size=1, max_size=2) if action.nargs == "+" else one
    if dest in _NAMES:
        return st.sampled_from(_NAMES[dest])
    one = {int: st.integers(0, 64), float: st.one_of(st.floats(0, 1, exclude_max=True), st.sampled_from([0.0, 1.0]))}.get(
        action.type, st.just(action.default or "none"))
    if action.nargs in ("+", 2, 3):
        count = 3 if action.nargs == 3 else 2
        return st.lists(one, min_size=count, max_size=count).map(sorted)
    return one


_KEYS = st.sampled_from(sorted(FLAGS))
_VALUED_KEYS = _KEYS.flatmap(lambda dest: st.tuples(st.just(dest), st.one_of(_within(dest, FLAGS[dest]), _of_type(FLAGS[dest]))))


# ---------------------------------------------------------------- recipes
def _yaml(value) -> str:
    """The value as a careless author would write it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return {math.inf: ".inf", -math.inf: "-.inf"}.get(value, ".nan")
    return str(value)


@st.composite
def _near_miss(draw) -> str:
    """A key with one letter more, less, changed or in another case; with a dash, a prefix, a space."""
    key = draw(_KEYS)
    place = draw(st.integers(0, len(key) - 1))
    return draw(st.sampled_from([key[:place] + key[place + 1:], key[:place] + "x" + key[place:], key.upper(), "--" + key,
                                 "no_" + key, key + " ", key.replace("_", "-"), key.replace("_", ""), key[:place], f'"{key}\\0"',
                                 "config", "list_models", "<<", "? " + key, "__class__", "_Loader"]))


# Texts that YAML reads in a way of its own.
_SPELLINGS = st.sampled_from([
    "~", "null", "", "yes", "no", "on", "off", "y", "True", "TRUE", "'true'", "010", "0o10", "0x1F", "0b101", "1_000",
    "190:20:30", "1:30", "1:30.5", "12e03", "1e", "1e5", "-1e-5", ".5", "5.", "+1", "+.inf", ".NaN", "-.INF", "nan", "inf",
    "1e400", "-1e400", "0x" + "f" * 5000, "9" * 5000, "9" * 4000, "2001-12-14", "2001-12-14t21:59:43.10-05:00", "2024-99-99",
    "=", "<<", "!", "!!int", "!!int ''", "!!int abc", "!!float x", "!!bool maybe", "!!timestamp x", "!!binary '@@'",
    "!!binary aGk=", "!!set {a, b}", "!!omap [a: 1]", "!!pairs [a: 1]", "!!str 5", "!!null x", "!!seq x", "!!map [1]",
    "!local x", "!<tag:x> y", "&a 5", "*nowhere", "&a [*a]", "&a {b: *a}", "'", '"', '"\\ud800"', '"\\x00"', '"\\uFFFF"',
    "|\n  a\n  b", ">-\n  folded", "[", "]", "{", "}", "{a: b}", "{lr: 1}", "[[1]]", "[1, [2]]", "[[[[[[[[1]]]]]]]]", "%TAG",
    "@x", "`x`", "#", "a: b", "- 1", "\t5", "5\t", "5 # five"])
_CODE = ["!!python/object/apply:os.system ['touch {0}']", "!!python/object/apply:os.mkdir ['{0}']",
         "!!python/object/new:os.system ['touch {0}']", "!!python/object/apply:subprocess.Popen [['touch', '{0}']]",
         "!!python/object/apply:builtins.eval [\"open('{0}', 'w')\"]",
         "!!python/object/apply:builtins.exec [\"open('{0}', 'w')\"]",
         "!!python/name:os.system", "!!python/module:antigravity", "!!python/object:builtins.object {{}}",
         "!!python/tuple [!!python/object/apply:os.system ['touch {0}']]",
         "{{? !!python/object/apply:os.system ['touch {0}'] : 1}}", "[&x !!python/object/apply:os.system ['touch {0}'], *x]",
         "!<tag:yaml.org,2002:python/object/apply:os.system> ['touch {0}']",
         "!!python/object/new:type {{args: [z, !!python/tuple [], {{extend: !!python/name:exec}}], "
         "listitems: \"open('{0}', 'w')\"}}"]


def _bomb(kind: str, depth: int = 9, width: int = 9) -> str:
    """Nine lines that expand to 9^9 values: of lists, of mappings, of merged mappings; as a value or as a key."""
    opening, closing = {"list": ("[", "]"), "key": ("[", "]"), "map": ("{", "}"), "merge": ("", "")}[kind]
    lines = ["a0: &a0 " + ("{x: 1}" if kind == "merge" else f"{opening}{'x: lol' if kind == 'map' else 'lol'}{closing}")]
    for level in range(1, depth + 1):
        names = [f"*a{level - 1}"] * width
        if kind == "merge":
            inside = "{<<: [" + ", ".join(names) + "]}"
        elif kind == "map":
            inside = "{" + ", ".join(f"k{i}: {name}" for i, name in enumerate(names)) + "}"
        else:
            inside = "[" + ", ".join(names) + "]"
        lines.append(f"a{level}: &a{level} {inside}")
    return "\n".join(lines + ["? *a9\n: 1" if kind == "key" else "lr: *a9"])


def bombs(kind: str) -> list[str]:
    """Under keys that are not flags, and inside a flag's value."""
    rows = ", ".join(re.findall(r"&a\d .*", _bomb(kind)))
    return [_bomb(kind), f"lr: [{rows}]", f"opt_betas: [{rows}]", f"? [{rows}]\n: 1"]


@st.composite
def _lines(draw, canary: str) -> str:
    lines = []
    kinds = draw(st.sampled_from([["good"], ["good", "good", "good", "odd", "near", "any", "code", "nested", "twice"]]))
    for _ in range(draw(st.integers(0, 6))):
        kind = draw(st.sampled_from(kinds))
        key, value = draw(_VALUED_KEYS)
        if kind == "good":
            lines.append(f"{key}: {_yaml(draw(_within(key, FLAGS[key])))}")
        elif kind == "any":
            lines.append(f"{key}: {_yaml(value)}")
        elif kind == "odd":
            lines.append(f"{key}: {draw(_SPELLINGS)}")
        elif kind == "near":
            lines.append(f"{draw(_near_miss())}: {_yaml(value)}")
        elif kind == "code":
            lines.append(f"{key}: {draw(st.sampled_from(_CODE)).format(canary)}")
        elif kind == "nested":
            lines.append(f"{key}:\n  {draw(_KEYS)}: {draw(_SPELLINGS)}\n  - 1")
        else:
            lines += [f"{key}: {_yaml(value)}", f"{draw(st.sampled_from([key, key.replace('_', '-')]))}: {draw(_SPELLINGS)}"]
    if kinds == ["good"]:
        return "\n".join(lines)
    return draw(st.sampled_from(["\n", "\n", "\n", "\r\n", "\r", "\n\t", "\n---\n", "\n  "])).join(lines)


def recipes(canary: str) -> st.SearchStrategy[bytes]:
    """Bytes of a file that --config is given; what would run code creates `canary`."""
    broken = ["lr: " + "[" * 3000, "{" * 3000, "- " * 3000, "? " * 3000, "lr: 1\n" * 300, "# " + "x" * 200_000,
              "%YAML 9.9\n---\nlr: 1", "lr: 1\n...\nlr: 2", "a: &" + "b" * 2000 + " 1"]
    expanding = [text for kind in ("list", "map", "merge", "key") for text in bombs(kind)]
    text = st.one_of(*[_lines(canary)] * 3, st.sampled_from(expanding), st.text(max_size=60), st.sampled_from(broken))
    encoding = st.sampled_from(["utf-8"] * 6 + ["utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp037"])
    encoded = st.tuples(text, encoding).map(
        lambda pair: pair[0].encode(pair[1], "surrogatepass" if pair[1].startswith("utf") else "replace"))
    odd = st.sampled_from([b"\0", b"\xff", b"\xef\xbb\xbf", b"\x85", b"\x1b", b"\t", b"%", b"\xed\xa0\x80"])
    spoiled = st.tuples(encoded, odd, st.integers(0, 40)).map(lambda t: t[0][:t[2]] + t[1] + t[0][t[2]:])
    ordinary = _lines(canary).map(lambda text: text.encode("utf-8", "surrogatepass"))
    return st.one_of(ordinary, ordinary, encoded, spoiled, st.binary(max_size=60))


# ---------------------------------------------------------------- command lines
@st.composite
def command_lines(draw, recipe: str = "") -> list[str]:
    """Words after `main.py`; about a third also name `recipe`, where it is given."""
    words: list[str] = []
    kinds = draw(st.sampled_from([["good"], ["good", "good", "any", "any", "no value", "near", "word", "equals"]]))
    for _ in range(draw(st.integers(0, 7))):
        dest, value = draw(_VALUED_KEYS)
        action = FLAGS[dest]
        kind = draw(st.sampled_from(kinds))
        option = draw(st.sampled_from(action.option_strings))
        if action.nargs == 0:
            option = draw(st.sampled_from([f"--{dest}", f"--no-{dest}", f"--{dest.replace('_', '-')}"]))
            words += [option + "=true"] if kind == "equals" else [option]
            continue
        if kind == "good":
            value = draw(_within(dest, action))
        texts = [number_text(v) for v in value] if isinstance(value, list) else [number_text(value)]
        if kind == "near":
            words += ["--" + draw(_near_miss()).strip(), *texts]
        elif kind == "no value":
            words.append(option)
        elif kind == "word":
            words.append(draw(TEXTS))
        elif kind == "equals":
            words.append(f"{option}={texts[0] if texts else ''}")
        else:
            words += [option, *texts]
    if draw(st.integers(0, 19)) == 19:
        words.append(draw(st.sampled_from(["-h", "--help", "--", "-", "-x", "--list-models", "@file", "--config",
                                           "--config=/dev/null", "--config=/", "--config=",
                                           "--config=nowhere.yaml", "--config=/dev/zero"])))
    if recipe and draw(st.integers(0, 2)) == 0:
        words += ["--config", recipe]
    return words


def number_text(value) -> str:
    """A value as a word of the command line; also beyond the number of digits that Python writes."""
    return f"1{'0' * 5000}" if isinstance(value, int) and abs(value) >= 10 ** 400 else str(value)


# ---------------------------------------------------------------- good flags in odd company
def _odd_values() -> dict[str, list]:
    """dest -> values that `validate` lets through, most of them at a limit; a run with any of them takes a second. Left out: what
    compiles (a minute), downloads, DIGITS (ten seconds), and `--profile`."""
    tiny, large = 1e-300, float(LARGEST)
    models = [f"vit_nano_patch8_32_{kind}" for kind in ("KAN", "GKAN", "EKAN", "ViT")]
    values = {
        "model": models * 2 + ["test_vit", "test_resnet", "test_convnext", "test_nfnet", "resnet18.nothing", "vit_nano.x_KAN",
                               "swin_tiny_patch4_window7_224", "nothing", "hf-hub:a/b"],
        "batch_size": [1, 2, 15, 16, 24, 48, 50, 10 ** 9], "epochs": [1, 2], "grad_accum": [1, 2, 7, 10 ** 9],
        "input_size": [1, 8, 31, 32, 33, 64, (8, 32), (64, 8), (32, 33), (1, 64)],
        "drop": [0, 0.5, 1 - 1e-16], "drop_path": [0, 0.5, 1 - 1e-16],
        "hdim_kan": [1, 3, 64], "kan_grid_range": [(-2, 2), (0, tiny), (-large, large), (5, 5.000001), (-tiny, tiny)],
        "kan_grid_points": [2, 3, 17, 33, 200], "kan_h": [tiny, 1e-6, 1, large], "kan_groups": [0, 1, 3, 8, 10 ** 9],
        "model_ema_decay": [0, 0.5, 1 - 1e-16], "opt": sorted(name for name in list_optimizers() if "kron" not in name),
        "opt_eps": [tiny, 1e-8, 1, large], "opt_betas": [(0,), (0, 0), (0.9, 0.999), (0.9, 0.99, 0.999), (0.5,) * 5],
        "clip_grad": [tiny, 1e-3, 1, large], "momentum": [0, 0.9, 1 - 1e-16], "weight_decay": [0, 0.05, 1e3, large],
        "kan_lr_mult": [0, 1, large], "kan_weight_decay": [0, 1, large], "layer_decay": [tiny, 0.5, 1],
        "sched": _NAMES["sched"], "lr": [tiny, 1e-9, 1e-3, 1, 1e4, large], "lr_noise": [(0,), (0, 0), (0.2, 1), (1, 0)],
        "lr_noise_pct": [0.01, 1], "lr_noise_std": [tiny, 1, large], "warmup_lr": [0, 1, large], "min_lr": [0, 1, large],
        "decay_epochs": [tiny, 1e-9, 0.5, 1, large], "warmup_epochs": [0, 1, 5, 10 ** 6], "cooldown_epochs": [0, 10 ** 6],
        "patience_epochs": [0, 10 ** 6], "decay_rate": [tiny, 0.1, 1, large], "color_jitter": [0, 0.3, 1, large],
        "crop_padding": [0, 1, 32], "hflip": [0, 1],
        "aa": ["none", "", "rand", "rand-m0", "rand-m99-mstd999.9-n3", "rand-mmax1", "rand-p0", "rand-m9-inc1-n5", "augmix",
               "augmix-m99-w9-d9-a0.001-b1", "augmix-a999", "original-mstd999", "originalr", "v0", "v0r-mstd0.5", "3a",
               "rand-tweights", "rand-t3a", "rand-t3aw-n10", "rand-m9-m0-m5", "augmix-mstd0"],
        "smoothing": [0, 0.1, 1 - 1e-16], "train_interpolation": _NAMES["train_interpolation"],
        "reprob": [0, tiny, 1], "remode": _NAMES["remode"], "recount": [1, 50],
        "mixup": [0, tiny, 1e-3, 1, large], "cutmix": [0, tiny, 1, large], "cutmix_minmax": [(0, 1), (0, tiny), (0.2, 0.8)],
        "mixup_prob": [0, 0.5, 1], "mixup_switch_prob": [0, 0.5, 1], "mixup_mode": _NAMES["mixup_mode"],
        "distillation_type": ["soft", "hard"], "distillation_alpha": [0, 1], "distillation_tau": [tiny, large],
        "teacher_model": ["nothing", "test_vit"], "teacher_path": ["nowhere.pth", ""],
        "finetune": ["nowhere.pth", "~nobody_here/x", "x" * 5000, "/dev/null", "http://[::1", "é\udcff", "a/" * 3000, "file:///x"],
        "resume": ["auto", "nowhere.pth", "~nobody_here/x", "/dev/null", "x" * 5000, "http://[::1", "é\udcff", "file:///x"],
        # Hugging Face's would ask the hub
        "data_set": [name for name in FLAGS["data_set"].choices if name != "DIGITS" and not name.startswith("hf")]
        + ["torch/image_folder", "torch/cifar10"],
        "inat_category": ["kingdom"], "val_split": [tiny, 0.5, 1], "num_classes": [1, 3, 10 ** 6],
        "data_split": [("train", "val"), ("train", ""), ("a.tar|0", "a.tar|5"),
                       ("a.tar|9", "pipe:touch x.tar|9"), ("x" * 5000,) * 2],
        "input_key": ["png", ""], "target_key": ["cls", "label,x"],
        "data_path": ["", "nowhere", "~nobody_here", "x" * 5000, "/dev/null", "é\udcff"],
        "output_dir": ["/dev/null", "/proc/nothing", "~nobody_here/x", "x" * 5000, "é\udcff", "a/" * 3000],
        "eval_crop_ratio": [0.1, 0.875, 1, 1.15], "mean": [(0, 0, 0), (0, 0.5, 1)], "std": [(0.001,) * 3, (1, 0.5, 1)],
        "device": ["cpu", "cpu:0", "cpu:1", "cuda", "cuda:9", "mps", "meta", "auto"],
        "num_workers": [0, 1], "seed": [0, 1, 2 ** 63 - 1], "start_epoch": [0, 1, 10 ** 6], "print_freq": [1, 10 ** 9],
        "world_size": [1, 2, 10 ** 9], "dist_url": ["env://", "tcp://", "file://"], "keep": [1, 1000],
        "save_interval_steps": [0, 1, 10 ** 9], "save_interval_minutes": [0, tiny, large], "dist_timeout": [tiny, 1, large],
        "max_unreadable": [0, tiny, 1]}
    for dest, action in FLAGS.items():
        if dest not in values and dest not in ("download", "compile", "profile", "kan_backend", "track"):
            values[dest] = list(action.choices) if action.choices and action.nargs != 0 else [True, False]
    return values


@st.composite
def odd_runs(draw, data: str, output: str) -> list[str]:
    """A command line of the real program: one to six flags beside those that keep a run short."""
    values = _odd_values()
    words = ["--epochs", "1", "--device", "cpu", "--num_workers", "0", "--model", "vit_nano_patch8_32_KAN", "--batch-size", "16",
             "--data-path", data, "--data-set", "FOLDER", "--warmup-epochs", "0"]
    for dest in draw(st.lists(st.sampled_from(sorted(values)), min_size=1, max_size=6, unique=True)):
        value = draw(st.sampled_from(values[dest]))
        option = FLAGS[dest].option_strings
        if FLAGS[dest].nargs == 0:
            words.append(option[0] if value else option[-1])
        elif isinstance(value, tuple):
            words += [option[0], *map(str, value)]
        else:
            words += [option[0], str(value)]
    return words + (["--output_dir", output] if "--output_dir" not in words and draw(st.booleans()) else [])


def run_outcome(argv: list[str], seconds: float = 60) -> str:
    """"trained", "refused" (exit code 2) or "stopped" (1): how the real program ends, in this process.

    Raises Violation where it ends in anything but success or a sentence."""
    import main as program
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    err.reconfigure(errors="backslashreplace")      # as a process's own
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), at_most(seconds):
            code = program.main(argv)
    except Violation as violation:
        raise Violation(f"{violation}: main.py {shlex.join(argv)}") from violation
    except BaseException as error:
        raise Violation(f"{type(error).__name__}: {error}: main.py {shlex.join(argv)}\n"
                        f"{traceback.format_exc(limit=-6)}") from error
    lines = err.buffer.getvalue().decode().splitlines()
    start = {0: "", 1: "stopped: ", 2: "error: "}.get(code)
    told = [line for line in lines if line.startswith(("stopped: ", "error: "))]
    if start is None or any("Traceback" in line for line in lines) or told != ([lines[-1]] if code else []) or \
            (code and not (lines[-1].startswith(start) and lines[-1].isprintable() and len(lines[-1]) < 700)):
        raise Violation(f"exit code {code} with {lines[-3:]}: main.py {shlex.join(argv)}")
    return {0: "trained", 1: "stopped", 2: "refused"}[code]
