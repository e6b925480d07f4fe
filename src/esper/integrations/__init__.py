"""Training frameworks, an adapter each. An adapter translates a framework's moments into calls of
``growth`` and decides nothing.

The doors are ``lightning``, ``transformers`` and ``accelerate``; ``import esper`` imports none of
them, and each says which extra it needs where its framework is missing. Nothing that trains, and no
framework's class, may be needed by the rooms below.
"""
