"""Events in the log of the process."""

import json
import logging

from told_runs import told_run

from esper.contracts.events import event_to_json
from esper.observability.logs import LOGGER, LoggingSink


def test_each_event_is_a_record_with_its_fields(caplog):
    """People read a sentence, machines the whole event under names that clash with none."""
    events = list(told_run())
    with caplog.at_level(logging.INFO, LOGGER):
        for event in events:
            LoggingSink().publish(event)
    assert [r.esper_kind for r in caplog.records] == [e.kind for e in events]
    (record,) = [r for r in caplog.records if r.esper_kind == "trial_read"]
    assert record.getMessage() == "update 15: package 1 taken over: z = 4"
    assert (record.esper_update, record.esper_time_s, record.esper_run_id) == (15, 1.5, "0" * 32)
    assert record.esper_event == json.loads(event_to_json(events[record.esper_seq]))


def test_nobody_listens_and_nothing_is_made(caplog):
    """Below INFO an event costs a look at the level."""
    with caplog.at_level(logging.WARNING, LOGGER):
        for event in told_run():
            LoggingSink().publish(event)
    assert caplog.records == []
