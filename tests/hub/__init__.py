"""Tests of the model hub, against a local server with its HTTP API."""
