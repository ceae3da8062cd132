"""Layers: Deformer, attention, MLP, norm, block. Imports ops."""
