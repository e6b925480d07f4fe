"""What is done with seeds between calls: grafting, probing, shadow passes, upkeep, folding.

No forward of a layer lives here, and nothing is fetched. The doors are ``grafting`` and
``maintenance``.
"""
