"""Reading, writing and downloading checkpoints. This file imports nothing."""
WEIGHTS = ("model", "model_ema")        # keys of a checkpoint: the trained weights and their moving average
