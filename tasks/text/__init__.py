"""Language modelling: corpora, tokenisers, the token cache and windows over it."""
