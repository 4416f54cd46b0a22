"""From finished runs to statistics, tables, figures and a report; reads run folders, trains nothing.

load -> sections (runs of one task and data) -> rows (configurations over seeds) -> differences.
"""
