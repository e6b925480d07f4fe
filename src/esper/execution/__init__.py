"""The engine: layers with seeds, their state, their guard, their kernels. It does no I/O."""
