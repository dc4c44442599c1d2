"""From files to batches: who reads which row at which step, and how it gets there."""
