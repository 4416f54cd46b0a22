"""Settings of the whole suite."""

import os

# Several test processes with several threads each wait for one another most of the time.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
