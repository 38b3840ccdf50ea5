"""What a user sees of a run: the live view, the metrics and the report."""
