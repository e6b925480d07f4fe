"""Kernels by themselves, without a layer: compiled, kept as modules, executed.

No layer and no seed is known here. The door is ``kernel_executor``.
"""
