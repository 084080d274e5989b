"""Measuring length control: the paper's scores, quality beside them, intervals, and the client that asks."""
