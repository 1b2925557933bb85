"""benchmarks/torture.py: a real run of two processes, killed again and again."""
import pytest

from benchmarks import torture

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kills", [3, pytest.param(100, marks=pytest.mark.timeout(3600))])
def test_killed_again_and_again_it_ends_as_the_run_left_in_peace(kills, capsys):
    code = torture.main(["--kills", str(kills), "--epochs", "3" if kills < 10 else "12"])
    said = capsys.readouterr().out
    assert code == 0, said
    assert f"{kills} kills (" in said and "negative control noticed" in said and "0 hung" in said
    assert said.count(": equal") >= 1 and "DIFFERENT" not in said
