"""The run folder: its layout, written atomically and read, in one place."""
