"""Choosing the next tokens of many streams at once, each by its own parameters.

`params` has what a caller can set, `stream_sampler` what is kept of each stream, `batch_sampler` the choice for a
batch, `stages` the changes that it makes to scores, `random_numbers` the draws, `grammar` which tokens a grammar
allows, `in_sight` the ids that penalties count.

Terms:

* logits: what the model returns.
* scores: logits after any change.
* draw: one random number of a stream; there is one for each sampled token.
"""
