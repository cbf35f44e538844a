"""LeRobot's ACT: model, loss, processors and optimizer."""
