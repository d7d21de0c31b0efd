"""One migration: the two ends as straight-line async code, the journal, the preamble, the record of what happened."""
