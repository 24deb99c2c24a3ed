"""What `ray job submit` runs. The only place that imports Ray."""
