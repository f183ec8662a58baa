"""`generate` of enabled models: continuing streams (continuation, matching), beam search, rows that end early."""
