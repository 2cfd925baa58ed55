"""What a run says of itself: metrics, timeline, terminal, log files, report."""
