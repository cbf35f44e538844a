"""Roll a policy out in environments: episodes, metrics and videos. Knows nothing of training."""
