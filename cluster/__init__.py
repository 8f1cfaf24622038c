"""Where Ray lives: placement, groups of processes, weight sync and the driver."""
