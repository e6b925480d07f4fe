"""The optimizer through growth: parameters that appear and go, warm-up, snapshots, replicas.

Nothing is decided here: ``sync_optimizer`` and the growth controller both use it. The doors are
``optimizer``, ``deepening`` and ``widening``.
"""
