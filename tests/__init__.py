"""The tests, which mirror the rooms of pusht_act."""

import os

# Before anything imports torch: two threads on a busy machine wait for each other, and another thread than the main
# one, such as a background evaluation's, has as many as this says.
os.environ["OMP_NUM_THREADS"] = "1"
