"""Ranks: process group, placement of tasks, the one collective per step, liveness."""
