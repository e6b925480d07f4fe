"""Every task of ``make bench-growth``, by name."""

import depth
import images

TASKS = {task.name: task for task in (*images.TASKS, *depth.TASKS)}
