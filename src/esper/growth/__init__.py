"""When, where and what to grow, and on what evidence."""
