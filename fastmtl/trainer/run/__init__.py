"""A run of the command line: its configuration, its folder, its interrupts."""
