"""What a training run will need: memory and time, predicted from a model's configuration, without weights or a GPU."""
