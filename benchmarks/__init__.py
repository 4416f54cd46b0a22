"""Facts and timings of operators and mixers, made by commands and kept in docs/."""
