"""Runs as one page that answers hover, zoom, log axis and "hide this run": facts in, one HTML file out.

uPlot (assets/uPlot.*, MIT licence beside it) draws; page.js feeds it. Both stand inside the page, which loads nothing.
"""
