"""Writing the pruned model so that it loads everywhere, its model card, and loading it back strictly."""
