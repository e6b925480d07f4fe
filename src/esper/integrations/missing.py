"""What is raised where an adapter's framework is not installed."""

from __future__ import annotations


def missing_framework(framework: str, extra: str) -> ImportError:
    """Return the error of an adapter whose framework cannot be imported.

    Args:
        framework: Name of the framework's package.
        extra: The extra of ``esper-morph`` that brings it.
    """
    return ImportError(
        f"esper.integrations needs {framework} here, which cannot be imported; "
        f"pip install 'esper-morph[{extra}]' brings it",
        name=framework,
    )
