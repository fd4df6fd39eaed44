"""The launch scripts, run against stubs of what they call and against real local processes."""
