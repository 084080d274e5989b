"""`lenvm view`: answers with the predicted remaining length along their tokens, as one interactive HTML file."""
