"""From scores to a smaller model: selection under a budget, removal, compaction of the live model."""
