"""Processes and files: signals, ranks, the lock, worker processes, seeds. Knows nothing of ACT or PushT."""
