"""The language model: config, model, decode state, checkpoint folders. Imports nn."""
