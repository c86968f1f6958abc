"""The one place that differentiates the losses of several tasks.

An :class:`~fastmtl.engine.engine.Engine` hands each batch to a method of ``methods/``, which runs the forward pass and
the VJPs; the :class:`~fastmtl.engine.jacobian.Jacobian` that comes of it has the Gram matrix, and turns weights into
``.grad``. It knows no strategy and no trainer; other processes are a :class:`~fastmtl.engine.comm.Comm`.
"""
