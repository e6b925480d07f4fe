"""Events in the log of the process, by the standard library."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Final

from esper.contracts.events import event_to_json
from esper.observability.sentences import sentence_of

if TYPE_CHECKING:
    from esper.contracts.events import Event

LOGGER: Final = "esper.events"


class LoggingSink:
    """Logs every event at ``INFO``: a sentence for people, the event's fields for machines.

    Each record has the attributes ``esper_kind``, ``esper_update``, ``esper_time_s``,
    ``esper_run_id``, ``esper_seq`` and ``esper_event``, the whole event as JSON has it; a formatter
    that writes JSON finds them by these names.

    Args:
        logger: Name of the logger, or the logger.
    """

    def __init__(self, logger: str | logging.Logger = LOGGER) -> None:
        self._logger = logger if isinstance(logger, logging.Logger) else logging.getLogger(logger)

    def publish(self, event: Event) -> None:
        """Log one event, where anybody listens."""
        if not self._logger.isEnabledFor(logging.INFO):
            return
        fields = {
            "esper_kind": event.kind,
            "esper_update": event.update,
            "esper_time_s": event.time_s,
            "esper_run_id": event.run_id,
            "esper_seq": event.seq,
            "esper_event": json.loads(event_to_json(event)),
        }
        self._logger.info("update %d: %s", event.update, sentence_of(event), extra=fields)
