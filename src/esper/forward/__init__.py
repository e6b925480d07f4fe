"""The hot path: what runs when a layer is called, and what chooses it.

It imports state, compiler and contracts, and nothing that can wait: no I/O, no event loop, no lock
in a forward, no branch on data. The doors are ``class_change`` (which forward a layer has) and
``generated_class`` (those forwards).
"""
