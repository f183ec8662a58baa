"""`StreamPool`: many endless streams of one model, batched.

`pool` and `stream` are what callers use; `generation` is one call of `generate`. `scheduler` lets threads run the steps
of the `engine`, which chooses what a step runs, on streams that are in `memory`: rows of the rings of a `row_cache`, or
a cache for each stream. Parked ones are in host memory (`moved`) or on `disk`. `chooser` chooses tokens, which a
`drafts.Drafter` may have drafted: that of `prompt_lookup` or of `draft_model`, as `speculation` says. `state` is what
is kept of a stream, `ids` and `messages` its ids and messages, `saved` its file. `model` is the model with its
tokenizer; `stops` ends a text at a string.

Of a model that is spread over ranks, rank 0 has all of this, and its memory is a `leading` one, which tells the other
ranks by `records` what to do to theirs; these are `joining`.
"""
