"""Putting the parts together: settings from the environment, a user's job, the demo and its arms.

Nothing here is imported by a room below. The doors are ``run_job`` and ``demo``; ``settings`` is
the only reader of the environment.
"""
