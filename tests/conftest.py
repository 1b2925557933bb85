"""One thread: the tests' results and times must not depend on the number of cores."""
import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")       # for the processes that tests start; before torch is imported

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


def pytest_collection_finish():
    """The garbage collector need not walk again what is imported: it stays to the end."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Digits of three classes on disk. Read only."""
    from e2e import write_digits  # imports the whole program, which few test files need

    return write_digits(tmp_path_factory.mktemp("digits"))
