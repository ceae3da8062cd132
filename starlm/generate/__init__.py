"""Text from a model: sampling and streaming. Imports model and data."""
