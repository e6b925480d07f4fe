"""Training frameworks, an adapter each, which calls ``growth`` and decides nothing.

The doors are ``lightning``, ``transformers`` and ``accelerate``; ``import esper`` imports none of
them, and each says which extra it needs where its framework is missing. No room below may know a
framework.
"""
