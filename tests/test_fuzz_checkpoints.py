"""benchmarks/fuzz_checkpoints.py: hostile files through the whole program."""
import os
import re
import subprocess
import sys

import pytest
from helpers import ROOT

pytestmark = pytest.mark.slow


def python(*words) -> tuple[int, str]:
    ran = subprocess.run([sys.executable, *words], cwd=ROOT / "benchmarks", capture_output=True, text=True,
                         env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"})
    return ran.returncode, ran.stdout + ran.stderr


@pytest.mark.parametrize("count", [55, pytest.param(1000, marks=pytest.mark.timeout(3600))])
def test_hostile_checkpoints_are_refused_or_fallen_back_from(count):
    code, said = python("fuzz_checkpoints.py", "--n", str(count), "--seed", "1")
    assert code == 0, said
    total = next(line for line in said.splitlines() if line.startswith("all "))
    files, refused, fell_back, loaded, ran_code, crashed, hung = map(int, re.findall(r"\d+", total))
    assert files == count == refused + fell_back + loaded and ran_code == crashed == hung == 0
    assert min(refused, fell_back, loaded) > 0


# Files that do not behave as labelled, and a careless reader.
NOTICED = {
    "crashed": "f.hostile_files = lambda good, *_: [Hostile('k', 'w', saved(good))]",
    "ran code": """
import pickle
from vision_kan.checkpoints import untrusted
untrusted.read = lambda path: pickle.loads(path.read_bytes())
f.hostile_files = lambda good, canary, *_: [Hostile('k', 'w', pickle.dumps(_Call(__import__('os').mkdir, str(canary))))]""",
    "hung": """
import time
f.LIMIT_S = 20
real, f.Ground.outcome = f.Ground.outcome, lambda self, *words: setattr(f, 'run', lambda *w: time.sleep(99)) or \
    setattr(f, 'LIMIT_S', 1) or real(self, *words)
f.hostile_files = lambda good, *_: [Hostile('k', 'w', b'')]"""}


@pytest.mark.parametrize("what", NOTICED)
def test_what_it_notices(what):
    code, said = python("-c", f"""
import sys
import fuzz_checkpoints as f
from hostile_checkpoints import Hostile, _Call, saved
{NOTICED[what]}
sys.exit(f.main(["--n", "1"]))""")
    assert code == 1 and f"0 {what} " in said, said
