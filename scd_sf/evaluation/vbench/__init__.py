"""VBench (PyPI ``vbench`` 0.1.5): videos of its prompts, scores in an environment of its own,
totals, a report.

``prompts.json`` (946 entries) is taken from VBench's wheel, ``constants.json`` from its scoring
constants (Apache-2.0, see NOTICE); ``published.json`` holds rows that papers print, each with its
source.
"""
