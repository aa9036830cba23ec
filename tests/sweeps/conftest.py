"""The sweeps share the warm process of the tests of training runs."""

from tests.beyond.conftest import run_forks, warm_process

__all__ = ["run_forks", "warm_process"]
