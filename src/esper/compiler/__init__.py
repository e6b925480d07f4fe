"""From a blueprint to a kernel: operations, shapes, lowering, bytes and back, and the catalog.

No layer, no seed and no registry is known here, and nothing is fetched. The doors are ``compile``,
``codec`` and ``catalog``; ``operations`` is the table of all that a blueprint may ask for.
"""
