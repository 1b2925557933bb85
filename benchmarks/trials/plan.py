"""A plan of runs, from a YAML file or the command line."""
from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

from benchmarks.trials.variants import SETTINGS, SIZES, Run, Variant, parse_variant
from vision_kan.common.errors import UserError, one_line

KEYS = {"setting": str, "size": str, "epochs": int, "seeds": list, "variants": list, "best": bool}


@dataclass
class Stage:
    """Runs that need what earlier stages have left behind.

    variants: for each entry the texts of its combinations.
    best: run only the combination with the highest top-1 so far of each entry."""
    setting: str
    variants: list[list[str]]
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    size: str = "nano"
    epochs: int | None = None
    best: bool = False

    def parsed(self, text: str, device: str) -> Variant:
        return parse_variant(text, self.setting, self.size, self.epochs, device)

    def runs(self, device: str, rows: dict[tuple, dict[str, Any]]) -> list[Run]:
        """In their order: by seed, then by variant. rows: the finished ones by `Run.key`."""
        entries = [[self.parsed(text, device) for text in entry] for entry in self.variants]
        if self.best:
            entries = [[self._best(entry, device, rows)] for entry in entries]
        return list(dict((run.key, run) for seed in self.seeds for entry in entries for variant in entry
                         for run in [Run(self.setting, variant, seed, device)]).values())

    def _best(self, entry: list[Variant], device: str, rows: dict[tuple, dict[str, Any]]) -> Variant:
        """By the mean over the seeds that all finished combinations have."""
        found: dict[str, dict[int, float]] = {}
        for variant in entry:
            key = Run(self.setting, variant, 0, device).key
            found[variant.text] = {row["seed"]: row["top1"] for k, row in rows.items() if (*k[:4], k[5]) == (*key[:4], key[5])}
        found = {text: seeds for text, seeds in found.items() if seeds}
        if not found:
            raise UserError(f"best: no run of {entry[0].name} is finished by which to choose")
        shared = set.intersection(*map(set, found.values()))
        if not shared:
            raise UserError(f"best: the finished combinations of {entry[0].name} share no seed by which to choose")
        best = max(found, key=lambda text: mean(found[text][seed] for seed in shared))
        return next(variant for variant in entry if variant.text == best)


def read_plan(file: Path) -> list[Stage]:
    """The stages of a plan. Raises UserError, a sentence with the key that is wrong.

    The file holds `stages`, a list in the order of importance, and what is the same for all of them beside it: `setting`, `size`,
    `epochs`, `seeds`. A stage has these keys too, `variants` and `best`. A variant is a text as --variants takes it, or
    {variant: TEXT, lr: [...], weight_decay: [...]}: every combination of the lists."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--plan {file} cannot be read: {one_line(error)}") from error
    if not isinstance(content, dict) or not isinstance(content.get("stages"), list) or not content["stages"]:
        raise UserError(f"--plan {file}: stages must be a list of at least one stage")
    common = {key: value for key, value in content.items() if key != "stages"}
    _check(common, f"--plan {file}: ", {"variants", "best"})
    stages = []
    for number, stage in enumerate(content["stages"], 1):
        where = f"--plan {file}: stage {number}: "
        if not isinstance(stage, dict):
            raise UserError(f"{where}it must have keys such as variants")
        _check(stage, where)
        values = {**common, **stage}
        for key in ("setting", "variants"):
            if key not in values:
                raise UserError(f"{where}{key} is missing")
        values["variants"] = [_combinations(entry, where) for entry in values["variants"]]
        stages.append(Stage(**values))
        for entry in stages[-1].variants:
            for text in entry:
                try:
                    stages[-1].parsed(text, "cpu")
                except UserError as error:
                    raise UserError(f"{where}variants: {error}") from None
    return stages


def _check(values: dict[str, Any], where: str, without: Collection[str] = ()) -> None:
    allowed = [key for key in KEYS if key not in without]
    for key, value in values.items():
        if key not in allowed:
            raise UserError(f"{where}{key} is none of {', '.join(allowed)}")
        if type(value) is not KEYS[key] or value == []:
            kind = {str: "a name", int: "a whole number", list: "a list", bool: "true or false"}[KEYS[key]]
            raise UserError(f"{where}{key} must be {kind}, not {value}")
    for key, names in (("setting", SETTINGS), ("size", SIZES)):
        if key in values and values[key] not in names:
            raise UserError(f"{where}{key} {values[key]} is not one of {', '.join(names)}")
    if values.get("epochs", 1) < 1:
        raise UserError(f"{where}epochs must be at least 1")
    if any(type(seed) is not int or seed < 0 for seed in values.get("seeds", [])):
        raise UserError(f"{where}seeds must be whole numbers from 0 on, not {values['seeds']}")


def _combinations(entry: Any, where: str) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    if not isinstance(entry, dict) or not isinstance(entry.get("variant"), str):
        raise UserError(f"{where}variants: an entry is a text or has the key variant with one, not {entry}")
    lists = {key: value if isinstance(value, list) else [value] for key, value in entry.items() if key != "variant"}
    for key, values in lists.items():
        if not values:
            raise UserError(f"{where}variants: {key} of {entry['variant']} must be a list of at least one value")
    return [",".join([entry["variant"], *(f"{key}={value}" for key, value in zip(lists, values))])
            for values in product(*lists.values())]
