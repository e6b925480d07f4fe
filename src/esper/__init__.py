"""Grow a PyTorch model in place while it trains, on evidence, and get a plain module back."""

__version__ = "0.1.0"
