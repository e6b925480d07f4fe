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
            "ESPER_BUS_URL": "redis://host:6379/0",
            "ESPER_REPORT_TO": "tensorboard, wandb,",
            "ESPER_METRICS_PORT": "9100",
        }
    )
    assert settings == Environment(
        run_dir=Path("/data/runs"),
        traceback=True,
        worker_name="ann",
        api_url="http://host",
        bus_url="redis://host:6379/0",
        report_to=("tensorboard", "wandb"),
        metrics_port=9100,
    )


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("ESPER_TRACEBACK", "yes", "is 0 or 1, got 'yes'"),
        ("ESPER_OFFLINE", "true", "is 0 or 1, got 'true'"),
        ("ESPER_CACHE_BYTES", "10G", "is a number of bytes, got '10G'"),
        ("ESPER_CACHE_BYTES", "-1", "is a number of bytes, got '-1'"),
        ("ESPER_METRICS_PORT", "off", "is a port from 1 to 65535, got 'off'"),
        ("ESPER_METRICS_PORT", "70000", "is a port from 1 to 65535, got '70000'"),
    ],
)
def test_a_value_that_cannot_be_is_refused(name, value, said):
    """A wrong value names the variable, what it may be and what was found."""
    with pytest.raises(EsperError, match=f"{name} {said}"):
        read_environment({name: value})


def test_the_cache_is_in_the_user_s_cache_folder_unless_something_else_is_said():
    """The most particular variable decides, and the budget is what is said."""
    home = {"HOME": "/home/ann"}
    assert read_environment(home).cache_dir == Path("/home/ann/.cache/esper")
    xdg = {**home, "XDG_CACHE_HOME": "/scratch"}
    assert read_environment(xdg).cache_dir == Path("/scratch/esper")
    said = {**xdg, "ESPER_CACHE_DIR": "/data/kernels", "ESPER_CACHE_BYTES": "0"}
    settings = read_environment({**said, "ESPER_OFFLINE": "1"})
    assert (settings.cache_dir, settings.cache_bytes) == (Path("/data/kernels"), 0)
    assert settings.offline
