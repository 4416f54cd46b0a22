"""From finished runs to statistics, tables, figures and a report; it trains nothing.

load -> sections (runs of one task and data) -> rows (configurations over seeds) -> differences.
"""
