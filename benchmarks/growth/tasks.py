"""Every task of ``make bench-growth``, by name."""

import depth
import extra_budget
import gromo_tutorial
import images
import other_data
import peers_tasks
import remedies
import useless

TASKS = {
    task.name: task
    for task in (
        *images.TASKS,
        *remedies.TASKS,
        *other_data.TASKS,
        *depth.TASKS,
        *extra_budget.TASKS,
        *useless.TASKS,
        peers_tasks.TASK,
        gromo_tutorial.TASK,
    )
}
