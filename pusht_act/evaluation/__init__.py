"""Evaluate a policy in environments: episodes, metrics and videos. Knows nothing of training."""
