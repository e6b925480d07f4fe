"""A registry over HTTP: addresses, rights, limits, and the words of refusals.

It stands on a ``StoredRegistry`` and knows no model, layer or compiler. The door is
``app.build_app``; who runs it, and with which settings, is decided in ``services``.
"""
