"""The warm process that the tests of training runs share."""

import pytest

from tests.beyond import forks
from tests.beyond.runs import RunForks


@pytest.fixture(scope="session", autouse=True)
def warm_process() -> None:
    """Let the warm process import PyTorch while the first tests run."""
    forks.warm_context()


@pytest.fixture(scope="session")
def run_forks() -> RunForks:
    """A function that runs jobs one by one, each in forks of the warm process."""
    return forks.run_jobs
