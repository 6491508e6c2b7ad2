"""A real S3 server on loopback, for the tests that need one."""
