"""The pipeline: prompts, base model, samples, length value model, evaluation and report from one recipe."""
