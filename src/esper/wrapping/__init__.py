"""Host model <-> host model with seeds."""
