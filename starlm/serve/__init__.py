"""An OpenAI-compatible server and its web chat. Imports generate, model and data."""
