"""Distilling a lookahead head: what a length value model says of every candidate, learnt from the state before it."""
