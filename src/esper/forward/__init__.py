"""The hot path: what runs when a layer is called, and what chooses it.

It imports state, compiler and contracts, and nothing that can wait; no file here does I/O, takes a
lock in a forward, or looks at data. The door is ``generated_class``.
"""
