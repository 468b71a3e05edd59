"""Stage one: videos to a feature store."""
