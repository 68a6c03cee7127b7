"""What people look at after a run: the comparison table and ``report.html``, made from the run directory alone."""
