"""Data: from files, tasks or the embedded corpus to the batches that training sees.

Takes rows of the user's files and gives checked records, splits that share no content, token ids and batches::

    files, tasks, embedded -> sources -> records -> prompt -> encoding (cache) -> packing, loading -> batches

A bad row is named with its file and line. It knows tokenizers, and nothing of models, masks or losses.
"""
