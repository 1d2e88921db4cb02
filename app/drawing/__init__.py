"""Drawings of what was measured: data in, SVG text out.

Lines and texts have classes, which the page's style sheet colours for its themes; colours that stand for numbers are in
the drawing. `standalone` makes a file of one, with all colours in it.
"""
