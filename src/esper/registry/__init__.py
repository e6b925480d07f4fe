"""Where artifacts are kept: by digest, in memory or in a directory."""
