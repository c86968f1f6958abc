"""What the rooms have in common and is of none of them."""
