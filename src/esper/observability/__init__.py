"""What a person reads afterwards: the event log and the report page."""
