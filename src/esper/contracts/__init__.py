"""What crosses a wall: blueprints, artifacts and their bytes, lifecycle, events, ports, errors."""
