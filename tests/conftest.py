"""What every test shares: shapes enforced at run time, one thread, no network, fixed seeds."""

import os

# Read when torch and huggingface_hub are imported, so they come before everything else. One
# thread per worker: two workers with two threads each stall on two cores, and sums keep their
# order, so that what is bit-equal on one machine is bit-equal on another. Child processes
# inherit both.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import random
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import config, install_import_hook

import tests.typechecker  # noqa: F401 - the hook finds it by name

# Every shape and type written in a signature of moduli is checked on every call under test.
# It must be in place before the first import of moduli.
install_import_hook("moduli", "tests.typechecker.check")

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# Whoever starts the tests in the background may have them ignore Ctrl-C, which child processes
# would inherit: those that are to be interrupted too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a CUDA device where there is none."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Each test starts from the same global random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries under test draw from the global state
    torch.manual_seed(0)


@pytest.fixture
def without_shape_checks() -> Iterator[None]:
    """Run moduli as users do, for `torch.compile` (which cannot trace the checks) and bad types."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def minilm_path() -> Path:
    """The directory of the real MiniLM encoder, fetched once and verified."""
    import moduli.data

    return moduli.data.fetch("minilm")
