"""Sampling: n completions of each prompt from a running server, with exact token ids, into a JSONL file."""
