"""What is done with seeds between calls: grafting, probing, shadow passes, upkeep, folding.

Blocks that sleep are here as well. No forward of a layer lives here but theirs, and nothing is
fetched. The doors are ``grafting``, ``maintenance`` and ``shallow``.
"""
