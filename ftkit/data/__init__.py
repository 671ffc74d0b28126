"""From files and hub ids to batches."""
