"""One thread: the tests' results and times must not hang on the number of cores."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")       # for the processes that tests start; before torch is imported

import torch  # noqa: E402

torch.set_num_threads(1)
