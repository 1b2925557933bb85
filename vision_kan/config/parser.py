"""The command-line parser, whose errors are one sentence each."""
import argparse
import difflib
import re
import reprlib
import sys
from collections.abc import Iterable

from vision_kan.common.errors import UserError
from vision_kan.common.text import one_or_two


class SwitchOrMode(argparse.Action):
    """`--X [MODE]` and `--no-X`: the mode, by default the first of the choices; None if off. A recipe may also say true or false,
    as for a switch."""

    def __init__(self, option_strings, dest, choices, **kwargs):
        options = [*option_strings, *("--no-" + option.removeprefix("--") for option in option_strings)]
        super().__init__(options, dest, nargs="?", choices=choices, **kwargs)

    def __call__(self, parser, namespace, values, option_string=None):
        off = (option_string or "").startswith("--no-")
        if off and values is not None:
            parser.error(f"{option_string} takes no value: leave out {values}")
        setattr(namespace, self.dest, None if off else values or next(iter(self.choices or ())))


class HeightAndWidth(argparse.Action):
    """`--X PIXELS [WIDTH]`: the side of a square, or height and width; stored as by `one_or_two`."""

    def __init__(self, option_strings, dest, **kwargs):
        super().__init__(option_strings, dest, nargs="+", **kwargs)

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, one_or_two(values) if len(values) < 3 else values)


class _HelpFormatter(argparse.HelpFormatter):
    """Shows each default as it is typed, but not None, "" or off."""

    def _get_help_string(self, action):
        help_text = (action.help or "").replace(" (default: %(default)s)", "")
        if action.default is None or action.default is False or action.default in ("", argparse.SUPPRESS):
            return help_text
        shown = " ".join(map(str, action.default)) if isinstance(action.default, list) else "%(default)s"
        return f"{help_text} (default: {shown})"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that treats dashes and underscores alike, does not accept abbreviations, and raises `UserError` with one
    sentence (and the nearest flag) instead of printing the usage."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{"allow_abbrev": False, "formatter_class": _HelpFormatter, **kwargs})
        # argparse reads -3 and -0.5 as numbers, but -1e3 as a flag
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")

    def parse_known_args(self, args=None, namespace=None):
        spelled = {with_underscores(option): option for option in self._option_string_actions}
        respelled = []
        for token in sys.argv[1:] if args is None else args:
            name, equals, value = token.partition("=")
            if name.startswith("--") and name not in self._option_string_actions:
                name = spelled.get(with_underscores(name), name)
            respelled.append(name + equals + value)
        return super().parse_known_args(respelled, namespace)

    def parse_args(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        self.refuse_unknown(unknown, self._option_string_actions)
        if unknown:
            hint = "too many arguments" if self._get_positional_actions() else "options begin with --"
            self.error(f"unexpected argument '{on_one_line(unknown[0])}': {hint}")
        return parsed

    def refuse_unknown(self, words: Iterable[str], known: Iterable[str]) -> None:
        """Raises UserError for the first word that is a flag, with the nearest of `known`."""
        for word in words:
            if word.startswith("-") and not self._negative_number_matcher.match(word):
                name = word.partition("=")[0]
                self.error(f"unknown flag {on_one_line(name)}{did_you_mean(name, known)}")

    def error(self, message):
        message = re.sub(r"^argument ", "", on_one_line(message, 500))
        if absent := re.match(r"the following arguments are required: (.*)", message):
            message = f"missing on the command line: {absent[1]} (see {self.prog} --help)"
        if number := re.match(r"(\S+): invalid (int|float) value: (.*)", message):
            message = f"{number[1]}: {number[3]} is not a {'whole number' if number[2] == 'int' else 'number'}"
        if several := re.match(r"one of the arguments (.*) is required", message):
            message = f"give one of {several[1].replace(' ', ', ')} (see {self.prog} --help)"
        message = message.replace(": not allowed with argument ", " cannot be combined with ")
        choice = re.match(r"(--\S+): invalid choice: '(.*?)' \(choose from", message)
        if choice:
            flag, value = choice.groups()
            choices = list(self._option_string_actions[flag.split("/")[0]].choices or ())
            message = f"{flag}: '{value}' is not one of {', '.join(choices)}{did_you_mean(value, choices)}"
        raise UserError(message)


def with_underscores(name: str) -> str:
    return name.replace("-", "_")


def on_one_line(text: str, most: int = 200) -> str:
    """The text without line breaks and unprintable characters; a long text loses its middle."""
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= most else f"{text[:most // 2]} ... {text[-most // 4:]}"


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """': did you mean X?', or '' if no word is similar."""
    close = nearest(word, words)
    return f": did you mean {close}?" if close else ""


def nearest(word: str, words: Iterable[str]) -> str:
    """The most similar of `words`, or ''. Dashes, underscores and case do not count."""
    folded = {with_underscores(w).strip("_").lower(): w for w in words}
    close = difflib.get_close_matches(with_underscores(word).strip("_").lower(), folded, n=1, cutoff=0.7)
    return folded[close[0]] if close else ""


def describe_value(value) -> str:
    if value is None:
        return "empty"
    kinds = {bool: "the switch", int: "the number", float: "the number", str: "the text", list: "the list",
             dict: "the mapping"}
    text = str(value).lower() if isinstance(value, bool) else _short.repr(value)
    return f"{kinds.get(type(value), 'the ' + type(value).__name__)} {text[:80]}"


# repr() of nested YAML aliases would be exponentially long
_short = reprlib.Repr()
_short.maxlevel, _short.maxstring, _short.maxother = 2, 80, 80


def show_value(value) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(show_value, value))
    if isinstance(value, bool):
        return "on" if value else "off"
    try:
        return on_one_line(str(value)) or "''"
    except ValueError:      # Python converts at most 4300 digits
        return "a number with thousands of digits"
