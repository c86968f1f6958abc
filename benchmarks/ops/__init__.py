"""One module per op; each has `cases(device, quick)`."""
