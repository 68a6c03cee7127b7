"""Side-by-side measurements, each one command that prints ratios and writes JSON."""
