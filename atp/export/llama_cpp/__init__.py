"""llama.cpp as the wheel xllamacpp brings it: its C interface for checks and K-quants, its server for text."""
