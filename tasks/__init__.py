"""Data: text corpora, tokenisers, packing and recall generators. Knows no model."""
