"""From a data set to batches on the device. Knows no policy and no run directory."""
