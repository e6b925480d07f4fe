"""How to live with what fails: breaker, retry, deadline, clock, fence, health; one of each.

No kernel, layer or registry is known here: endpoints are names and calls are functions. Whoever
needs one of these imports its file; there is no other door.
"""
