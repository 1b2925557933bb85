"""How a checkpoint and a recipe fill in what was not given.

Precedence: default < model's own < checkpoint < recipe < command line."""
from argparse import Namespace
from dataclasses import dataclass, field, replace

from vision_kan.common.errors import UserError
from vision_kan.config.checks import impossible_path
from vision_kan.config.flags import FLAGS, PREPARATION, get_args_parser
from vision_kan.config.parser import show_value
from vision_kan.config.recipes import load_recipe

# What a checkpoint fills in: the scopes of flags, by what it is used for.
TAKEN = {None: (), "finetune": ("model",), "eval": ("model", "data"), "resume": ("model", "data", "training")}


@dataclass(frozen=True)
class Config:
    """Effective flags and where they come from.

    args: every flag's value. given: dest -> "command line" | "recipe FILE" for what the user said.
    sources: the same plus "checkpoint" | "model" after `resolve`; a dest that is missing has its default.
    notes: sentences about checkpoint values that were overridden or could not be understood.
    """
    args: Namespace
    given: dict[str, str]
    sources: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def parse_args(argv: list[str] | None = None) -> Config:
    """Defaults < the recipe named by --config < the command line (`argv`, or the process's).

    Raises `UserError` for an unknown flag or key, a value of the wrong type or outside the choices, and a
    recipe that can't be read. `validate` checks values, later: a checkpoint may still fill some in.
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


# ---------------------------------------------------------------- checkpoint and model fill in the rest
def resolve(config: Config, checkpoint_args: dict | Namespace | None = None,
            model_defaults: dict | None = None, purpose: str | None = None, models_own: dict | None = None) -> Config:
    """A flag that was not given takes the checkpoint's value, else the model's own, else its default.

    checkpoint_args: the `args` that a checkpoint holds (ours, DeiT's or the original Vision-KAN's: keys that
    are no flags are ignored). model_defaults: dest -> value that suits the model, e.g. {"input_size": 32}.
    models_own: dest -> what the checkpoint's model has where the checkpoint's flags say nothing.
    purpose decides what is taken (see `TAKEN`): "resume" everything but what belongs to one run, "eval" model and data,
    "finetune" the model unless --model names another one, and how images are prepared, None nothing.
    Returns a new Config and changes nothing. Raises `UserError` when a given flag contradicts the checkpoint
    that is resumed or evaluated, unless it may change there (`Flag.on_resume`, `Flag.on_eval`), which is noted.
    """
    model_defaults = model_defaults or {}
    stored, notes = _understood(checkpoint_args)
    taken = TAKEN[purpose]
    if purpose == "finetune" and "model" in config.given and config.args.model != stored.get("model"):
        taken = ()
    values, sources = dict(vars(config.args)), dict(config.given)
    for dest, value in model_defaults.items():
        if dest not in config.given:
            values[dest], sources[dest] = value, "model"
    if purpose == "resume":
        besides = {"teacher_path"}
    elif purpose == "finetune":     # weights go on with images as they know them; runs of before did not tell
        besides = PREPARATION if "mean" in stored else set()
    else:       # the images that were held out are chosen by the seed
        besides = {"seed"} if purpose == "eval" and stored.get("val_split") else set()
    for dest, value in stored.items():
        flag = FLAGS[dest]
        if flag.scope not in taken and dest not in besides:
            continue
        if dest not in config.given:
            if value is not None:
                values[dest], sources[dest] = value, "checkpoint"
            continue
        if value is None and values[dest] is not None:  # it was trained with the model's own value, as args.yaml says by null
            value = (models_own or {}).get(dest, model_defaults.get(dest))
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
    """Those of a checkpoint's args that are flags of more than one run, typed; and a note on each bad one."""
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
    """What came from the checkpoint, the model and the recipe, one line for each, then the notes; or ''.

    How the model is trained is listed only where it differs from the defaults."""
    groups: dict[str, list[str]] = {}
    for dest, source in config.sources.items():
        value, flag = getattr(config.args, dest), FLAGS[dest]
        plain = (flag.scope in ("training", "run") or dest in PREPARATION - {"eval_crop_ratio"}) and value == flag.default
        if source == "command line" or value is None or plain:
            continue
        groups.setdefault(source, []).append(f"{dest} {show_value(value)}")
    lines = [f"from the {source}: {', '.join(sorted(words))}" for source, words in groups.items()]
    return "\n".join([*lines, *config.notes])
