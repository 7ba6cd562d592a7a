"""One fresh process per attempt: files in, files out, JSON lines on standard output."""
