"""What a layer keeps: its record, the states of its seeds, their slots, kernels and calls.

No forward runs here, nothing is fetched, and nothing waits. The door is ``layer_record.record_of``.
"""
