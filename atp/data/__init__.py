"""Data: records and where they come from, token ids, and the batches that training sees.

``reading`` -> ``records`` -> ``encoding`` -> ``batches``; ``sources``, ``domains`` and ``streaming`` make splits of
what is read, ``prompt`` stands around records, ``check`` shows what a model would see.
"""
