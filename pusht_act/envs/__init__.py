"""gym-pusht: physics, coverage, rendering and vector environments. Imports neither torch nor lerobot."""
