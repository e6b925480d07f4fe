"""When, where and what to grow, and on what evidence.

No page and no command is made here: what happens goes to a journal. The doors are ``grower``, which
a training loop calls, and ``job``, a whole run as a value.
"""
