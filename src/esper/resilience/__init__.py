"""Time and failure, once for everybody who needs them."""
