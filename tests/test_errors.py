"""Errors in one line."""
import re

import pytest
from helpers import ROOT

from vision_kan.common.errors import one_line


@pytest.mark.parametrize("error, line", [
    (ValueError("first\nsecond"), "first"), (ValueError("\n  \n first \nsecond"), "first"), ("a text\nof two", "a text"),
    (ValueError(), "ValueError"), (OSError(""), "OSError"), (RuntimeError(" \n\n"), "RuntimeError"), ("", ""), ("\n", ""),
    (ValueError("a\x1b[2Jb"), "a?[2Jb")])
def test_one_line(error, line):
    assert one_line(error) == line


def test_its_length_and_its_last_line():
    assert one_line("x" * 1000) == "x" * 150 and one_line("x" * 1000, 7) == "x" * 7
    assert one_line(ValueError("a\nb\n c \n"), line=-1) == "c" and one_line(ValueError(), line=-1) == "ValueError"


def test_no_other_way_to_an_errors_line():
    """`str(error).splitlines()[0]` fails where the message is empty."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py"), *ROOT.glob("vision_kan/**/*.py")]
    lines = [f"{file.name}: {line.strip()}" for file in files if file.name != "errors.py"
             for line in file.read_text(encoding="utf-8").splitlines()
             if re.search(r"\b(e|error|failure|exception)\)[^\n]*\.splitlines\(\)", line)]
    assert not lines
