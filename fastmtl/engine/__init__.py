"""The one place that differentiates the losses of several tasks."""
