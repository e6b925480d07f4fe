"""From a blueprint to a kernel: operations, validation, lowering, bytes, catalog."""
