"""Device streams: side streams by seed, and gradients that arrive on them.

On the CPU everything runs inline. No layer is known here. The door is ``stream_manager``; another
device is an implementation of the port in ``device_streams``.
"""
