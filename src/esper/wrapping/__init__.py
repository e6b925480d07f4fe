"""From a host model to one with seeds, and back: wrap, unwrap, restore, export.

No registry, bus or page is known here, and nothing is decided about growth. The doors are ``wrap``,
``unwrap``, ``restore`` and ``export``.
"""
