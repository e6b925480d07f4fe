"""What happened, written down: a line of JSON an event, and the pages of a run.

It reads values of ``contracts`` and knows no model, no torch and no controller. The doors are
``event_log`` and ``report_files``.
"""
