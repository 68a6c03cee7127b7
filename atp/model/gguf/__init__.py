"""GGUF files as base models: read once, de-quantised, with the tokenizer that llama.cpp makes of them.

Takes a file as llama.cpp runs it; gives the config, the tensors under transformers' names and the tokenizer files.
:mod:`atp.export.gguf` writes such files and reads the tables here. It knows nothing of masks, runs or the hub.
"""
