"""`SinkCache`: one ring per attention layer behind transformers' `Cache` interface.

`sink_cache` has the cache, `layers` its layers, `state` what the layers share, `id_history` the ids that it was fed,
`stream_file` and `load_stream` the files of saved streams.

Terms:

* row: one row of the batch. Each row holds one stream.
* stream: the tokens fed to a row so far, without padding.
* token number: index of a token in its stream, from 0. ``seen`` counts the tokens of each row.
* column: index along dim 1 of ``input_ids``, counted from 0 over all calls. A column brings a token or padding to each
  row, so token and column numbers are equal until a row has padding, and may differ from then on.
* padding: a place in ``input_ids`` that adds no token to the row's stream. It may stand anywhere in a row.
* token mask: bool ``[batch, tokens]``, True for tokens and False for padding; None if there is no padding.
* prefix: the first tokens of a stream.
* recorded ids: those that `IdHistory` still holds, a prefix and the most recent ones.
* prompt: the ids (or embeddings) that one call of `generate` is given.
"""
