"""Events, from publishers to sinks, within one process.

What an event says is no business of this room. The door is ``in_process``.
"""
