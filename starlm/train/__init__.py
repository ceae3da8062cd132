"""Pretraining: config, optimizers, schedule, checkpoints, the loop. Imports model and data."""
