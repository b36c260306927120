"""Ranks: process group, placement of tasks, the all-reduce, liveness."""
