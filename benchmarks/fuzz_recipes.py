"""Try thousands of odd recipes and command lines: each must be accepted, or refused in one sentence.

    python benchmarks/fuzz_recipes.py [--n 1000] [--runs 100] [--seed 0]

--n recipes and --n command lines go through `parse_args` and `validate`, and --runs odd combinations of valid flags through the
whole program, in this process, on a few dozen small images. It prints the number of each outcome. Exit code 1 if one ended in an
exception, ran code from a file, hung, or was refused without a sentence that names the fault; each kind of violation is printed
once, with the command that reproduces it. The strategies are in tests/hostile_recipes.py.
"""
import argparse
import contextlib
import io
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent / folder) for folder in ("", "tests")]

import hostile_recipes
import hypothesis
import torch
from e2e import write_digits
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st


def collect(strategy: st.SearchStrategy, check: Callable[[object], str], count: int, seed: int,
            violations: dict[str, str]) -> Counter:
    """The number of each outcome of `check` over `count` examples, and the first violation of each kind."""
    counts = Counter()

    @hypothesis.seed(seed)
    @settings(max_examples=count, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(strategy)
    def one(example) -> None:
        try:
            counts[check(example)] += 1
        except hostile_recipes.Violation as violation:
            counts["VIOLATION"] += 1
            violations.setdefault(str(violation)[:60], str(violation))

    one()
    return counts


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=1000, help="recipes, and command lines")
    parser.add_argument("--runs", type=int, default=100, help="whole runs")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    violations: dict[str, str] = {}
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        canary, recipe, output = folder / "ran", folder / "recipe.yaml", folder / "output"
        data = write_digits(folder / "data")
        os.chdir(folder)        # an --output_dir without a path lands here

        def read(text: bytes) -> str:
            recipe.write_bytes(text)
            return hostile_recipes.outcome(["--config", str(recipe)], canary)

        def parse(example: tuple[bytes, list[str]]) -> str:
            recipe.write_bytes(example[0])
            with contextlib.redirect_stdout(io.StringIO()):        # of --help
                return hostile_recipes.outcome(example[1], canary)

        def run(words: list[str]) -> str:
            shutil.rmtree(output, ignore_errors=True)
            return hostile_recipes.run_outcome(words)

        recipes = hostile_recipes.recipes(str(canary))
        lines = st.tuples(recipes, hostile_recipes.command_lines(str(recipe)))
        try:
            for title, strategy, check, count in (("recipes", recipes, read, args.n), ("command lines", lines, parse, args.n),
                                                  ("runs", hostile_recipes.odd_runs(str(data), str(output)), run, args.runs)):
                started = time.monotonic()
                counts = collect(strategy, check, count, args.seed, violations) if count else Counter()
                print(f"{counts.total():5} {title:14}" + ", ".join(f"{n} {what}" for what, n in sorted(counts.items())) +
                      f"  ({time.monotonic() - started:.0f} s)", flush=True)
        finally:
            os.chdir(before)
    for violation in violations.values():
        print(f"\nVIOLATION {violation}")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
