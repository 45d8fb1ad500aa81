"""The report of what has been run: one HTML page, Markdown and LaTeX tables."""
