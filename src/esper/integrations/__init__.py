"""Callbacks for training frameworks, an adapter each. There is none yet.

An adapter translates a framework's moments into calls of ``growth`` and decides nothing.
"""
