"""The same work in a host that kills a child's group alone, and does not look for what has left."""

import sys

from compiled_work import work  # noqa: F401 - found by its name

sys.modules["__main__"]._children = list
