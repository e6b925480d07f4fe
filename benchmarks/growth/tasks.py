"""Every task of ``make bench-growth``, by name."""

import depth

TASKS = {task.name: task for task in (*depth.TASKS,)}
