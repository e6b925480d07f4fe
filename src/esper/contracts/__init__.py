"""What crosses a wall between rooms: blueprints, artifacts, kinds of layers, events, ports.

Values and their checks only: nothing here does I/O, imports torch or imports another room. The door
is whichever file has the name of the thing; ``ports`` has what rooms ask of each other.
"""
