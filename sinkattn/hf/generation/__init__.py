"""`generate` of enabled models: how it continues a stream (continuation, matching), beams, rows that ended early."""
