"""What the commands take from the environment."""

from pathlib import Path

import pytest

from esper.contracts.errors import EsperError
from esper.services.settings import Environment, read_environment


@pytest.mark.parametrize(
    "environment", [{}, {"ESPER_RUN_DIR": "", "ESPER_TRACEBACK": ""}], ids=["unset", "empty"]
)
def test_without_variables_there_are_defaults(environment):
    """A variable that is not set or is empty leaves the default."""
    assert read_environment(environment) == Environment(run_dir=Path("runs"), traceback=False)


def test_variables_are_read():
    """Each variable decides its setting."""
    settings = read_environment(
        {
            "ESPER_RUN_DIR": "/data/runs",
            "ESPER_TRACEBACK": "1",
            "ESPER_WORKER_NAME": "ann",
            "URZA_API_URL": "http://host",
        }
    )
    assert settings == Environment(
        run_dir=Path("/data/runs"), traceback=True, worker_name="ann", api_url="http://host"
    )


def test_a_value_that_cannot_be_is_refused():
    """A wrong value names the variable, what it may be and what was found."""
    with pytest.raises(EsperError, match=r"ESPER_TRACEBACK is 0 or 1, got 'yes'"):
        read_environment({"ESPER_TRACEBACK": "yes"})
