"""Figures of merit: bits per byte. Imports generate, model and data."""
