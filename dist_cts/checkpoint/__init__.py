"""Checkpoints and phi on disk."""
