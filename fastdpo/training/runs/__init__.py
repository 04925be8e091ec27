"""What a run leaves and how it ends: checkpoints, artifacts, callbacks, the report of a loss that is not finite."""
