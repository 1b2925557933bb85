"""A flag: one row of the table in `flags`."""
import argparse
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from vision_kan.common.text import one_or_two
from vision_kan.config.parser import HeightAndWidth, SwitchOrMode, describe_value, did_you_mean, show_value

LARGEST = 10 ** 9       # upper bound for every number but the seed: above it arithmetic overflows
MAX_SIDE = 4096         # of an input image, in pixels


class Rule(NamedTuple):
    """A condition on a value, and the end of the sentence that refuses other values: 'must be at least 1'."""
    holds: Callable[[Any], bool]
    otherwise: str


def at_least(low: float) -> Rule:
    return Rule(lambda value: value >= low, f"must be at least {low}")


def between(low: float, high: float) -> Rule:
    return Rule(lambda value: low <= value <= high, f"must be from {low} to {high}")


POSITIVE = Rule(lambda value: value > 0, "must be greater than 0")
SHARE = Rule(lambda value: 0 < value <= 1, "must be greater than 0 and at most 1")
BELOW_1 = Rule(lambda value: 0 <= value < 1, "must be at least 0 and less than 1")


@dataclass(frozen=True)
class Flag:
    """A flag of main.py. The command line and recipes treat dashes and underscores alike.

    Args:
        option: the flag as shown. default: None if the model or the data set has its own.
        scope: what the flag describes, which decides when a checkpoint fills it in (`resolve`):
            "model" the network, "data" images and classes, "training" how it is trained,
            "run" where and how one run happens, which never comes from a checkpoint.
        type: bool is a switch `--X`, `--no-X`; None is text. nargs, metavar: argparse's.
        size: one number, or height and width. mode: a switch that also takes one of the choices.
        choices: checked by the parser; names: by `validate`, since DeiT's parser takes any text.
        rule: holds for each value; together: for all values at once.
        on_resume: may differ from the checkpoint's. These flags set length, batch, memory and arithmetic: they change the run on
            purpose, or another machine or a NaN requires it. on_eval: the same for an evaluation: other images or another crop.
        preparation: part of an image's preparation besides its size; timm's pretrained configurations have it too.
        one_shot: not allowed in a recipe, not written to args.yaml. path: a file, folder or URL.
        one_or_each: in a recipe or a checkpoint also a list with a value per block (of a pruned model).
        alias: a second spelling. deit: DeiT's default and the reason for another one; None if they are equal.
        ours: DeiT does not have this flag.
    """
    option: str
    default: Any
    scope: str
    help: str
    type: Any = None
    metavar: str | tuple[str, ...] | None = None
    nargs: str | int | None = None
    size: bool = False
    mode: bool = False
    choices: Sequence[str] | None = None
    names: tuple[str, ...] = ()
    rule: Rule | None = None
    together: Rule | None = None
    largest: int = LARGEST
    on_resume: bool = False
    on_eval: bool = False
    preparation: bool = False
    one_shot: bool = False
    path: bool = False
    one_or_each: bool = False
    alias: str = ""
    deit: tuple[Any, str] | None = None
    ours: bool = False

    @property
    def dest(self) -> str:
        return self.option.removeprefix("--").replace("-", "_")

    def add_to(self, group: argparse._ArgumentGroup) -> None:
        """Add the flag to a parser's group."""
        kind: dict[str, Any]
        if self.type is bool:
            kind = {"action": "store_true" if self.one_shot else argparse.BooleanOptionalAction}
        else:
            action = HeightAndWidth if self.size else SwitchOrMode if self.mode else "store"
            kind = {"action": action, "type": self.type, "metavar": self.metavar}
            if self.choices:
                kind["choices"] = self.choices
            if self.nargs:
                kind["nargs"] = self.nargs
        group.add_argument(*filter(None, (self.option, self.alias)), default=self.default, help=self.help, **kind)

    # ------------------------------------------------------------ values
    def typed(self, value: Any) -> Any:
        """A recipe's or checkpoint's `value` as the flag's type. ValueError: 'must be ..., not ...'."""
        if value is None:
            if self.default is None:
                return None
            raise ValueError("has no value")
        several = isinstance(value, (list, tuple))
        if self.one_or_each and several and value:
            return [self._typed_one(item) for item in value]
        if self.size:
            sides = value if several else [value]
            if len(sides) not in (1, 2):
                raise ValueError(f"must be a whole number, or two (height and width), not {describe_value(value)}")
            return one_or_two([self._typed_one(side) for side in sides])
        if self.nargs:
            if not several or not value or self.nargs not in ("+", len(value)):
                count = {"+": "one or more", 2: "two", 3: "three"}[self.nargs]
                raise ValueError(f"must be a list of {count} {'numbers' if self.type else 'names'}, not "
                                 f"{describe_value(value)}")
            return [self._typed_one(item) for item in value]
        return self._typed_one(value)

    def _typed_one(self, value: Any) -> Any:
        if self.mode and isinstance(value, bool):
            return self.choices[0] if value and self.choices else None
        if self.type is bool:
            if not isinstance(value, bool):
                raise ValueError(f"must be true or false, not {describe_value(value)}")
        elif self.type is int:
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"must be a whole number, not {describe_value(value)}")
        elif self.type is float:
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise ValueError(f"must be a number, not {describe_value(value)}")
            try:
                return float(value)
            except OverflowError:
                raise ValueError("must be a number of ordinary size") from None
        elif not isinstance(value, str):
            raise ValueError(f"must be text, not {describe_value(value)} (put it in quotes)")
        elif "\0" in value or re.search("[\ud800-\udfff]", value):      # on the command line: bytes that are not UTF-8
            raise ValueError(f"has a character that UTF-8 cannot encode, or a NUL: {describe_value(value)}")
        if self.choices is not None and value not in self.choices:
            raise ValueError(f"must be one of {', '.join(self.choices)}, not '{show_value(value)}'"
                             f"{did_you_mean(value, self.choices)}")
        return value

    def objection(self, value: Any) -> str:
        """Why a value of the flag's type is refused: 'must be at least 1'; '' if it is accepted."""
        for one in value if isinstance(value, (list, tuple)) else [value]:
            if one is None:
                continue
            if isinstance(one, float) and not math.isfinite(one):
                return "must be a finite number"
            if self.rule and not self.rule.holds(one):
                return self.rule.otherwise
            if isinstance(one, (int, float)) and abs(one) > self.largest:
                return f"must be at most {self.largest:,}".replace(",", " ")
            if self.names and one not in self.names:
                return f"is not one of {', '.join(self.names)}{did_you_mean(one, self.names)}"
        if self.together and value is not None and not self.together.holds(value):
            return self.together.otherwise
        return ""
