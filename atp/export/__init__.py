"""Exports: the pruned model written so that it loads elsewhere, and the proof that each format equals it.

Takes a smaller model, and an adapter where it is not merged; gives a Hugging Face directory with its model card, GGUF
and ONNX files, and for each the difference from the model in a fresh process. It does not know how a model was trained.
"""
