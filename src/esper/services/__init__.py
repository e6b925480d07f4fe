"""The composition root: settings, wiring, and the jobs that the commands run."""
