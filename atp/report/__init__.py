"""Reports: tables, charts and pages of one run, and of many side by side.

Takes run directories, from which it reads files alone; gives ``report.html``, tables as text, Markdown and CSV, and
pictures. It loads no model and does not know how figures were measured.
"""
