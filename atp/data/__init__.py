"""Data: from files, tasks or the embedded corpus to the batches that training sees.

Takes rows of the user's files and gives checked records, splits that share no content, token ids and batches::

    files, tasks, embedded -> reading -> records -> prompt -> encoding (cache) -> batches

``sources``, ``domains`` and ``streaming`` make splits of what is read; ``check`` shows what a model would see. A bad
row is named with its file and line. The room knows tokenizers, and nothing of models, masks or losses.
"""
