"""Checkpoints: read, written, downloaded. The package itself imports nothing."""
WEIGHTS = ("model", "model_ema")        # keys of a checkpoint: the trained weights and their moving average
