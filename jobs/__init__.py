"""What is submitted or run beside the package: thin scripts, not installed."""
