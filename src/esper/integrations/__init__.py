"""Callbacks for training frameworks. None is here yet; the room is where each will live."""
