"""vLLM: which exports it serves, the plugin it loads, and the layers its Transformers backend has no words for."""
