"""Parts of the Gram matrix layer by layer, without the gradients of the layers' weights."""
