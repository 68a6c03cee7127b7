"""GGUF files for llama.cpp.

Takes an exported Hugging Face directory; gives one file per quantisation: header, vocabulary and tensors in the layout
of the architecture that can hold the widths. It knows llama.cpp's conventions and nothing of masks or runs.
"""
