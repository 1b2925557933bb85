"""Recipes: `--config file.yaml`, read and written."""
import re
from argparse import Namespace
from pathlib import Path

import yaml

from vision_kan.common.errors import UserError, one_line
from vision_kan.config.flags import FLAGS
from vision_kan.config.parser import describe_value, did_you_mean, on_one_line, show_value, with_underscores

_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"


class _Loader(yaml.SafeLoader):
    """Loads plain data only (no tags that run code) and refuses duplicate and merge keys (`<<`). Numbers follow YAML 1.2: PyYAML
    follows 1.1, where 5e-4 and 1e5 are texts, 010 is 8 and 1:30 is 90. Here the first two are numbers, the others texts."""
    yaml_implicit_resolvers = {first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_INT, _FLOAT)]
                               for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()}

    depth = 0

    def compose_node(self, parent, index):
        self.depth += 1
        if self.depth > 20:
            raise yaml.composer.ComposerError(None, None, "a recipe is nested at most 20 levels deep",
                                              self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def flatten_mapping(self, node):
        # ten lines of merge keys can expand to a billion entries
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, "merge keys (<<) are not allowed", key_node.start_mark)


class _Dumper(yaml.SafeDumper):
    """Writes values so that `_Loader` and any other YAML reader read the same back (the texts '5e-4' and '1:30' get quotes)."""


_DECIMAL = re.compile(r"^[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?$"
                      r"|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$")
_Loader.add_implicit_resolver(_INT, re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789"))
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(_FLOAT, _DECIMAL, list("-+.0123456789"))


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict:
    seen = set()
    for key_node, _ in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key_node.start_mark)
        key = with_underscores(key_node.value)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key} appears twice",
                                                    key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
MOST_RECIPE_BYTES = 64 * 1024       # PyYAML takes a few seconds for this size


def load_recipe(path: str) -> dict:
    """Flags in a YAML file as dest -> value, each of its flag's type and choices.

    Keys may have dashes or underscores. Raises `UserError` naming the file and the key.
    """
    named = f"--config {on_one_line(path)}"
    try:
        with open(path, "rb") as file:
            text = file.read(MOST_RECIPE_BYTES + 1)
    except FileNotFoundError:
        beside = [str(p) for p in Path(path).parent.glob("*.yaml")]
        raise UserError(f"{named}: there is no such file{did_you_mean(path, beside)}") from None
    except OSError as e:
        raise UserError(f"{named}: the file cannot be read ({e.strerror})") from None
    if len(text) > MOST_RECIPE_BYTES:
        raise UserError(f"{named}: a file of more than {MOST_RECIPE_BYTES // 1024} KiB is not a recipe")
    try:
        recipe = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as e:
        where = f", line {e.problem_mark.line + 1}" if e.problem_mark else ""
        raise UserError(f"{named}{where}: not a recipe in plain YAML ({on_one_line(str(e.problem))})") from None
    # PyYAML raises the last four for a tag on a value of another kind, such as !!int ''
    except (yaml.YAMLError, ValueError, RecursionError, IndexError, KeyError, AttributeError, TypeError) as e:
        raise UserError(f"{named}: not a recipe in plain YAML ({one_line(e)})") from None
    if not isinstance(recipe, dict):
        raise UserError(f"{named}: a recipe is a list of 'flag: value' lines, not {describe_value(recipe)}")
    values = {}
    for key, value in recipe.items():
        dest = with_underscores(key) if isinstance(key, str) else None
        if dest not in FLAGS:
            keys = [flag.dest for flag in FLAGS.values() if not flag.one_shot]
            raise UserError(f"{named}: unknown key {show_value(key)}{did_you_mean(str(key).strip('-'), keys)}")
        if FLAGS[dest].one_shot:
            raise UserError(f"{named}: the key {show_value(key)} belongs on the command line, not in a recipe")
        try:
            values[dest] = FLAGS[dest].typed(value)
        except ValueError as e:
            raise UserError(f"{named}: {show_value(key)} {e}") from None
    return values


def dump_yaml(args: Namespace) -> str:
    """The flags as YAML that --config reads back to the same values."""
    plain = {dest: list(value) if isinstance(value, tuple) else value
             for dest, value in vars(args).items() if dest in FLAGS and not FLAGS[dest].one_shot}
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, default_flow_style=False, allow_unicode=True)
