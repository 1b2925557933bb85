"""How a checkpoint and a recipe fill in flags that were not given.

Precedence: default < model's own < checkpoint < recipe < command line."""
from argparse import Namespace
from dataclasses import dataclass, field, replace

from vision_kan.common.errors import UserError
from vision_kan.config.checks import impossible_path
from vision_kan.config.flags import FLAGS, PREPARATION, get_args_parser
from vision_kan.config.parser import show_value
from vision_kan.config.recipes import load_recipe

# The scopes of flags that a checkpoint fills in, by purpose.
TAKEN = {None: (), "finetune": ("model",), "eval": ("model", "data"), "resume": ("model", "data", "training")}


@dataclass(frozen=True)
class Config:
    """Effective flags and their sources.

    args: every flag's value. given: dest -> "command line" | "recipe FILE" for flags that the user gave.
    sources: the same plus "checkpoint" | "model" after `resolve`; a missing dest has its default.
    notes: sentences about checkpoint values that were overridden or could not be read.
    """
    args: Namespace
    given: dict[str, str]
    sources: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def parse_args(argv: list[str] | None = None) -> Config:
    """Defaults < the recipe of --config < the command line (`argv`, or the process's).

    Raises `UserError` for an unknown flag or key, a value of the wrong type or outside the choices, and a
    recipe that can't be read. `validate` checks values later, since a checkpoint may still fill some in.
    """
    parser = get_args_parser(add_help=True)
    unset = object()
    parsed = vars(parser.parse_args(argv, Namespace(**dict.fromkeys(FLAGS, unset))))
    values = {dest: flag.default for dest, flag in FLAGS.items()}
    given = {}
    for dest, value in parsed.items():
        if value is not unset:
            try:
                FLAGS[dest].typed(value)
            except ValueError as e:
                raise UserError(f"{FLAGS[dest].option} {e}") from None
    if parsed["config"] is not unset:
        recipe = load_recipe(parsed["config"])
        values.update(recipe)
        given.update(dict.fromkeys(recipe, f"recipe {parsed['config']}"))
    for dest, value in parsed.items():
        if value is not unset:
            values[dest] = value
            given[dest] = "command line"
    for dest in given:
        if FLAGS[dest].path and (reason := impossible_path(values[dest])):
            raise UserError(f"{FLAGS[dest].option} {show_value(values[dest])} ({given[dest]}) cannot be a path: {reason}")
    return Config(Namespace(**values), given, dict(given))


# ---------------------------------------------------------------- values from checkpoint and model
def resolve(config: Config, checkpoint_args: dict | Namespace | None = None,
            purpose: str | None = None, models_own: dict | None = None) -> Config:
    """A flag that was not given takes the checkpoint's value, else its default.

    checkpoint_args: the `args` of a checkpoint (ours, DeiT's or the original Vision-KAN's; other keys are ignored).
    models_own: dest -> the checkpoint model's value, for flags that the checkpoint's args leave open.
    purpose decides what the checkpoint fills in (see `TAKEN`): "resume" everything but the scope "run", "eval" model and data,
    "finetune" the model unless --model names another one, and the preparation of images; None nothing.
    Returns a new Config. Raises `UserError` if a given flag contradicts the checkpoint that is resumed or evaluated; a flag that
    may change there (`Flag.on_resume`, `Flag.on_eval`) gets a note instead.
    """
    stored, notes = _understood(checkpoint_args)
    taken = TAKEN[purpose]
    if purpose == "finetune" and "model" in config.given and config.args.model != stored.get("model"):
        taken = ()
    values, sources = dict(vars(config.args)), dict(config.given)
    if purpose == "resume":
        besides = {"teacher_path"}
    elif purpose == "finetune":     # prepare images as for these weights; older checkpoints do not record how
        besides = PREPARATION if "mean" in stored else set()
    else:       # the seed selects the held-out images
        besides = {"seed"} if purpose == "eval" and stored.get("val_split") else set()
    for dest, value in stored.items():
        flag = FLAGS[dest]
        if flag.scope not in taken and dest not in besides:
            continue
        if dest not in config.given:
            if value is not None:
                values[dest], sources[dest] = value, "checkpoint"
            continue
        if value is None and values[dest] is not None:  # null in args.yaml: it was trained with the model's own value
            value = (models_own or {}).get(dest)
        if values[dest] != value and flag.scope != "run":
            ours, where = show_value(values[dest]), config.given[dest]
            theirs = "none" if value is None else show_value(value)
            may_change = flag.on_resume if purpose == "resume" else flag.on_eval if purpose == "eval" else True
            if not may_change:
                remedy = ("leave it out, or start a new run from these weights with --finetune"
                          if purpose == "resume" else "leave it out")
                raise UserError(f"{flag.option} {ours} ({where}) contradicts the checkpoint, which has {theirs}: {remedy}")
            notes.append(f"{flag.option} is {ours} ({where}); the checkpoint has {theirs}")
    return replace(config, args=Namespace(**values), sources=sources, notes=(*config.notes, *notes))


def _understood(checkpoint_args) -> tuple[dict, list[str]]:
    """The checkpoint's args that are flags and not of the scope "run", typed; and a note on each invalid one."""
    if isinstance(checkpoint_args, Namespace):
        checkpoint_args = vars(checkpoint_args)
    stored, notes = {}, []
    for dest, value in (checkpoint_args or {}).items():
        if dest not in FLAGS or (FLAGS[dest].scope == "run" and dest != "teacher_path"):
            continue
        try:
            stored[dest] = FLAGS[dest].typed(value)
        except ValueError as e:
            notes.append(f"the checkpoint's {dest} {e}; it is ignored")
    return stored, notes


def describe_sources(config: Config) -> str:
    """The values from checkpoint, model and recipe, one line each, then the notes; or ''.

    Flags of training and run are listed only if they differ from the defaults."""
    groups: dict[str, list[str]] = {}
    for dest, source in config.sources.items():
        value, flag = getattr(config.args, dest), FLAGS[dest]
        plain = (flag.scope in ("training", "run") or dest in PREPARATION - {"eval_crop_ratio"}) and value == flag.default
        if source == "command line" or value is None or plain:
            continue
        groups.setdefault(source, []).append(f"{dest} {show_value(value)}")
    lines = [f"from the {source}: {', '.join(sorted(words))}" for source, words in groups.items()]
    return "\n".join([*lines, *config.notes])
