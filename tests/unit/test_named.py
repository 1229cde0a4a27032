"""deployments.named: Ray's errors become ours."""

import pytest
from ray.exceptions import RayTaskError

from deployments.named import caused
from serve.errors import Internal, Overloaded


def raised(cause: Exception) -> RayTaskError:
    return RayTaskError("forward", "Traceback: line 7 of pool.py", cause, ip="127.0.0.1")


def test_an_error_of_ours_comes_back_as_it_was(caplog):
    error = Overloaded("full", retry_after_s=3)
    assert caused(raised(error)) is error
    assert caplog.text == ""


@pytest.mark.parametrize("cause", [KeyError("tokens"), RuntimeError()])
def test_a_foreign_error_is_a_fault_of_ours_whose_place_the_log_knows(cause, caplog):
    found = caused(raised(cause))
    assert isinstance(found, Internal)
    assert found.message == f"{type(cause).__name__} in a worker."
    assert "line 7 of pool.py" in caplog.text
