"""Metrics files to HTML pages and plots."""
