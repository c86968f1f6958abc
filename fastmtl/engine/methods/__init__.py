"""How the gradients of all tasks are computed: one method for each kind of network."""
