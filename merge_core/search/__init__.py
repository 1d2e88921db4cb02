"""Searches: which numbers of a recipe are best, found by trying them out.

`document.py` says what was asked, `trials.py` what a trial is and what it came to, `plan.py` what a search takes,
`run.py` carries it out. What scores a candidate is not the core's affair: it is given as an `Evaluator`.
"""
