"""The package's front door."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import esper


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_importing_esper_imports_no_torch():
    """`import esper` and listing its names leave torch, numpy and safetensors unloaded."""
    code = (
        "import sys, esper; dir(esper); esper.EsperError; esper.BlueprintIR\n"
        "loaded = {'torch', 'numpy', 'safetensors'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )

    assert run_python(code).stderr == ""


@pytest.mark.slow
def test_using_wrap_imports_torch():
    """The control of the test above: a name that needs torch does load it."""
    code = "import sys, esper; esper.wrap; assert 'torch' in sys.modules"

    assert run_python(code).stderr == ""


@pytest.mark.parametrize("name", sorted(esper.__all__))
def test_every_public_name_is_there(name):
    """Each name of `__all__` can be looked up."""
    assert getattr(esper, name) is not None
    assert name in dir(esper)


def test_an_unknown_name_is_an_attribute_error():
    """A name that is not there is refused as Python refuses it."""
    with pytest.raises(AttributeError, match="no attribute 'graft'"):
        _ = esper.graft


def test_type_checkers_see_what_python_sees():
    """The TYPE_CHECKING block, the table of homes and `__all__` name the same things."""
    tree = ast.parse(Path(esper.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    declared = {
        alias.name: statement.module
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }

    assert declared == esper._HOME
    assert {*declared, "__version__"} == set(esper.__all__)
