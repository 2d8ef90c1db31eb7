"""What the pages show, as plain values: pure functions of rows and summaries, without HTML."""
