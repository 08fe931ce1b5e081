"""The work: one file per stage of the line."""
