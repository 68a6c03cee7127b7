"""Data: records and where they come from, token ids, and the batches that training sees.

``records`` <- ``sources``; ``records`` <- ``encoding`` <- ``batches``.
"""
